// squash and its vector-Jacobian product for a vector whose components are in several lanes.
//
// The length is computed from s / scale, so that nothing overflows. scale is 1 if float32 can square the
// components, else the largest component.
#pragma once

#include "device.h"

namespace capsops {

CAPSOPS_DEVICE float length_scale(float largest) {
    return largest == 0.0f || (largest > 1e-15f && largest < 1e15f) ? 1.0f : largest;
}

// The vector-Jacobian product with a gradient g is f g + h (n . g) n with n = s / |s|; `along` is n . g.
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
