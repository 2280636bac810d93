// The small mathematics that host and device share.
//
// squash(s) = f s with r = |s|, f = r / (1 + r^2); beyond r = 1 as 1 / (r + 1/r), so that nothing overflows.
// Its vector-Jacobian product is f g + h (n . g) n with n = s / r and h = r f', which changes its sign under
// r -> 1/r.
#pragma once

#if defined(__CUDACC__)
#define CAPSOPS_SHARED __host__ __device__ __forceinline__
#else
#define CAPSOPS_SHARED inline __attribute__((always_inline))
#endif

namespace capsops {

template <typename T>
CAPSOPS_SHARED T squash_factor(T r) {
    return r > T(1) ? T(1) / (r + T(1) / r) : r / (T(1) + r * r);
}

template <typename T>
CAPSOPS_SHARED T squash_slope(T r) {
    const T q = r > T(1) ? T(1) / r : r;
    const T d = T(1) + q * q;
    const T h = q * (T(1) - q * q) / (d * d);
    return r > T(1) ? -h : h;
}

}  // namespace capsops
