// squash and its vector-Jacobian product on a vector whose components lie in several lanes.
//
// The length is taken of s / scale, so that nothing overflows: scale is 1 for lengths that float32 can
// square, and the largest component otherwise.
#pragma once

#include "device.h"

namespace capsops {

CAPSOPS_DEVICE float length_scale(float largest) {
    return largest == 0.0f || (largest > 1e-15f && largest < 1e15f) ? 1.0f : largest;
}

// With n = s / |s|: squash(s) = along s; its product with a gradient g is f g + h (n . g) n.
struct Squash {
    float scale;   // of the length
    float length;  // |s / scale|
    float r;       // |s|

    CAPSOPS_DEVICE Squash(float scale, float square)
        : scale(scale), length(sqrtf(square)), r(scale * length) {}

    CAPSOPS_DEVICE float direction(float s) const { return length == 0.0f ? s : s / scale / length; }
    CAPSOPS_DEVICE float value(float s) const {
        if (r > 1.0f) {
            const float q = 1.0f / r;
            return s / scale / length / (1.0f + q * q);
        }
        return s * squash_factor(r);
    }
    CAPSOPS_DEVICE float vjp(float s, float g, float along) const {
        return squash_factor(r) * g + squash_slope(r) * along * direction(s);
    }
};

}  // namespace capsops
