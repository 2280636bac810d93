// squash and its vector-Jacobian product on one vector of n numbers.
#pragma once

#include <cmath>

#include "common/squash_factor.h"
#include "threading.h"

namespace capsops {
namespace CAPSOPS_ISA {

// A sum of squares between these bounds has neither overflowed nor lost precision by underflow.
template <typename T>
constexpr T smallest_square = sizeof(T) == 4 ? T(1e-30) : T(1e-280);
template <typename T>
constexpr T largest_square = T(1) / smallest_square<T>;

template <typename T>
CAPSOPS_INLINE bool is_safe_square(T square) {
    return square > smallest_square<T> && square < largest_square<T>;
}

// The largest |s_d| of numbers `stride` apart.
template <typename T>
inline T largest(const T* s, int64_t n, int64_t stride) {
    T scale = 0;
    for (int64_t d = 0; d < n; ++d)
        scale = std::fabs(s[d * stride]) > scale ? std::fabs(s[d * stride]) : scale;
    return scale;
}

// |s| of numbers `stride` apart whose sum of squares is outside these bounds.
template <typename T>
CAPSOPS_NOINLINE inline T scaled_length(const T* s, int64_t n, int64_t stride, T square) {
    if (square != square) return square;
    const T scale = largest(s, n, stride);
    if (scale == 0) return 0;
    T total = 0;
    for (int64_t d = 0; d < n; ++d) total += (s[d * stride] / scale) * (s[d * stride] / scale);
    return scale * std::sqrt(total);
}

template <typename T>
CAPSOPS_INLINE T length_from(const T* s, int64_t n, int64_t stride, T square) {
    return is_safe_square(square) ? std::sqrt(square) : scaled_length(s, n, stride, square);
}

template <typename T>
CAPSOPS_INLINE T length(const T* s, int64_t n) {
    T square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < n; ++d) square += s[d] * s[d];
    return length_from(s, n, 1, square);
}

// squash of numbers `stride` apart whose length overflows: the unit vector along s.
template <typename T>
CAPSOPS_NOINLINE inline void direction(const T* s, int64_t n, int64_t stride, T* v) {
    const T scale = largest(s, n, stride);
    T total = 0;
    for (int64_t d = 0; d < n; ++d) total += (s[d * stride] / scale) * (s[d * stride] / scale);
    for (int64_t d = 0; d < n; ++d) v[d * stride] = s[d * stride] / scale / std::sqrt(total);
}

template <typename T>
CAPSOPS_INLINE void squash_row(const T* s, int64_t n, T* v) {
    const T r = length(s, n), f = squash_factor(r);
    for (int64_t d = 0; d < n; ++d) v[d] = f * s[d];
    if (r > largest_square<T>) direction(s, n, 1, v);
}

template <typename T>
CAPSOPS_INLINE void squash_vjp_row(const T* s, const T* g, int64_t n, T* grad_s) {
    const T r = length(s, n), f = squash_factor(r), h = squash_slope(r);
    const T divisor = r == 0 ? T(1) : r;
    T along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < n; ++d) along += s[d] / divisor * g[d];
    for (int64_t d = 0; d < n; ++d) grad_s[d] = f * g[d] + h * along * (s[d] / divisor);
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
