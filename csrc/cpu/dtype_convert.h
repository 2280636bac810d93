// Conversion between the dtypes that tensors are stored in (float32, bfloat16, float16, float64) and the type
// that kernels compute in.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace capsops {
namespace CAPSOPS_ISA {

CAPSOPS_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

CAPSOPS_INLINE float float_from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

CAPSOPS_INLINE float from_bfloat16(uint16_t x) { return float_from_bits(uint32_t(x) << 16); }

CAPSOPS_INLINE uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

CAPSOPS_INLINE float from_float16(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7fff;
    // Read as float32 bits, the exponent is 112 too small. The multiplication corrects that, for subnormals
    // too.
    const float magnitude = float_from_bits(rest << 13) * float_from_bits(0x77800000);
    const uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | (rest << 13) : bits_of(magnitude);
    return float_from_bits(bits | sign);
}

CAPSOPS_INLINE uint16_t to_float16(float x) {
    const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    // Normal numbers: subtract 112 from the exponent and round to nearest even. Subnormal: adding 0.5 aligns
    // the last place.
    const uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
    const uint32_t subnormal = bits_of(float_from_bits(rest) + 0.5f) - 0x3f000000;
    uint32_t half = rest < 0x38800000 ? subnormal : normal;
    half = rest >= 0x477ff000 ? 0x7c00 : half;
    half = rest > 0x7f800000 ? 0x7e00 : half;
    return uint16_t(half | sign);
}

CAPSOPS_INLINE const void* element(const void* base, Dtype dtype, int64_t at) {
    return static_cast<const char*>(base) + at * dtype_size(dtype);
}

CAPSOPS_INLINE void* element(void* base, Dtype dtype, int64_t at) {
    return static_cast<char*>(base) + at * dtype_size(dtype);
}

// dst[0..n) = src[at..at+n)
template <typename T>
inline void read_row(const void* src, Dtype dtype, int64_t at, int64_t n, T* dst) {
    const void* p = element(src, dtype, at);
    const uint16_t* p16 = static_cast<const uint16_t*>(p);
    if (dtype == Dtype::bfloat16) {
        for (int64_t k = 0; k < n; ++k) dst[k] = T(from_bfloat16(p16[k]));
    } else if (dtype == Dtype::float16) {
        for (int64_t k = 0; k < n; ++k) dst[k] = T(from_float16(p16[k]));
    } else {
        std::memcpy(dst, p, n * sizeof(T));
    }
}

// dst[at..at+n) = src[0..n)
template <typename T>
inline void write_row(void* dst, Dtype dtype, int64_t at, int64_t n, const T* src) {
    void* p = element(dst, dtype, at);
    uint16_t* p16 = static_cast<uint16_t*>(p);
    if (dtype == Dtype::bfloat16) {
        for (int64_t k = 0; k < n; ++k) p16[k] = to_bfloat16(float(src[k]));
    } else if (dtype == Dtype::float16) {
        for (int64_t k = 0; k < n; ++k) p16[k] = to_float16(float(src[k]));
    } else {
        std::memcpy(p, src, n * sizeof(T));
    }
}

// Whether kernels that compute in T can use a tensor of this dtype without conversion.
template <typename T>
CAPSOPS_INLINE bool is_native(Dtype dtype) {
    return dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
