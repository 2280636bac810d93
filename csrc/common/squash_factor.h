// The scalar functions of squash.
//
// squash(s) = f s with r = |s| and f = r / (1 + r^2). Beyond r = 1 f is computed as 1 / (r + 1/r), so that
// nothing overflows. The vector-Jacobian product is f g + h (n . g) n with n = s / r and h = r f'. h changes
// its sign under r -> 1/r.
#pragma once

#include "common/host_device.h"

namespace capsops {

template <typename T>
CAPSOPS_HOST_DEVICE T squash_factor(T r) {
    return r > T(1) ? T(1) / (r + T(1) / r) : r / (T(1) + r * r);
}

template <typename T>
CAPSOPS_HOST_DEVICE T squash_slope(T r) {
    const T q = r > T(1) ? T(1) / r : r;
    const T d = T(1) + q * q;
    const T h = q * (T(1) - q * q) / (d * d);
    return r > T(1) ? -h : h;
}

}  // namespace capsops
