// Conversion between the dtypes that tensors are stored in (float32, bfloat16, float16, float64) and the type
// that kernels compute in.
#pragma once

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace capsops {
namespace CAPSOPS_ISA {

// The conversions are written for whole registers: compilers do not vectorise all of them by themselves.
constexpr int convert_width = register_bytes / 4;

typedef VecOf<float, convert_width>::Vec Floats;
typedef VecOf<float, convert_width>::Int Ints;
typedef uint32_t Words __attribute__((vector_size(register_bytes)));
typedef uint16_t Halves __attribute__((vector_size(register_bytes / 2)));

CAPSOPS_INLINE Words words_of(Floats x) { return reinterpret_cast<Words>(x); }
CAPSOPS_INLINE Floats floats_of(Words x) { return reinterpret_cast<Floats>(x); }

// Whether x < bound, for numbers below 2^31: instruction sets before AVX-512 compare only signed numbers.
CAPSOPS_INLINE Words is_below(Words x, int32_t bound) {
    return reinterpret_cast<Words>(reinterpret_cast<Ints>(x) < bound);
}

CAPSOPS_INLINE Words choose(Words condition, Words a, Words b) { return (condition & a) | (~condition & b); }

CAPSOPS_INLINE Floats from_bfloat16(Words x) { return floats_of(x << 16); }

CAPSOPS_INLINE Words to_bfloat16(Floats x) {
    const Words bits = words_of(x);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return choose(is_below(bits & 0x7fffffff, 0x7f800001), rounded, (bits >> 16) | 0x40);
}

CAPSOPS_INLINE Floats from_float16(Words x) {
    const Words sign = (x & 0x8000) << 16, rest = x & 0x7fff;
    // Read as float32 bits, the exponent is 112 too small. The multiplication corrects that, for subnormals
    // too.
    const Floats magnitude = floats_of(rest << 13) * 0x1p112f;
    return floats_of(choose(is_below(rest, 0x7c00), words_of(magnitude), 0x7f800000 | (rest << 13)) | sign);
}

CAPSOPS_INLINE Words to_float16(Floats x) {
    const Words bits = words_of(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    // Normal numbers: subtract 112 from the exponent and round to nearest even. Subnormal: adding 0.5 aligns
    // the last place.
    const Words normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
    const Words subnormal = words_of(floats_of(rest) + 0.5f) - 0x3f000000;
    Words half = choose(is_below(rest, 0x38800000), subnormal, normal);
    half = choose(is_below(rest, 0x477ff000), half, Words{} + 0x7c00);
    half = choose(is_below(rest, 0x7f800001), half, Words{} + 0x7e00);
    return half | sign;
}

CAPSOPS_INLINE Words load_halves(const uint16_t* p) {
    Halves x;
    std::memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(x, Words);
}

CAPSOPS_INLINE void store_halves(uint16_t* p, Words x) {
    const Halves narrow = __builtin_convertvector(x, Halves);
    std::memcpy(p, &narrow, sizeof(narrow));
}

template <bool IsFloat16>
CAPSOPS_NOINLINE inline void widen(const uint16_t* src, int64_t n, float* dst) {
    const auto convert = [](const uint16_t* from, float* to) {
#if defined(__AVX512F__)
        // With a mask of ones: GCC 12 warns of the other form.
        if constexpr (IsFloat16) {
            _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(
                                     0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
            return;
        }
#elif defined(__F16C__)
        if constexpr (IsFloat16) {
            _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
            return;
        }
#endif
        const Words x = load_halves(from);
        store<float>(to, IsFloat16 ? from_float16(x) : from_bfloat16(x));
    };
    int64_t at = 0;
    for (; at + convert_width <= n; at += convert_width) convert(src + at, dst + at);
    if (at == n) return;
    uint16_t last[convert_width] = {};
    float converted[convert_width];
    std::memcpy(last, src + at, (n - at) * sizeof(uint16_t));
    convert(last, converted);
    std::memcpy(dst + at, converted, (n - at) * sizeof(float));
}

template <bool IsFloat16>
CAPSOPS_NOINLINE inline void narrow(const float* src, int64_t n, uint16_t* dst) {
    const auto convert = [](const float* from, uint16_t* to) {
#if defined(__AVX512F__)
        if constexpr (IsFloat16) {
            _mm256_storeu_si256(
                reinterpret_cast<__m256i*>(to),
                _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
            return;
        }
#elif defined(__F16C__)
        if constexpr (IsFloat16) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                             _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
            return;
        }
#endif
        const Floats x = load<float>(from);
        store_halves(to, IsFloat16 ? to_float16(x) : to_bfloat16(x));
    };
    int64_t at = 0;
    for (; at + convert_width <= n; at += convert_width) convert(src + at, dst + at);
    if (at == n) return;
    float last[convert_width] = {};
    uint16_t converted[convert_width];
    std::memcpy(last, src + at, (n - at) * sizeof(float));
    convert(last, converted);
    std::memcpy(dst + at, converted, (n - at) * sizeof(uint16_t));
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
    if constexpr (sizeof(T) == 4) {
        if (dtype == Dtype::bfloat16) return widen<false>(static_cast<const uint16_t*>(p), n, dst);
        if (dtype == Dtype::float16) return widen<true>(static_cast<const uint16_t*>(p), n, dst);
    }
    std::memcpy(dst, p, n * sizeof(T));
}

// dst[at..at+n) = src[0..n)
template <typename T>
inline void write_row(void* dst, Dtype dtype, int64_t at, int64_t n, const T* src) {
    void* p = element(dst, dtype, at);
    if constexpr (sizeof(T) == 4) {
        if (dtype == Dtype::bfloat16) return narrow<false>(src, n, static_cast<uint16_t*>(p));
        if (dtype == Dtype::float16) return narrow<true>(src, n, static_cast<uint16_t*>(p));
    }
    std::memcpy(p, src, n * sizeof(T));
}

// Whether kernels that compute in T can use a tensor of this dtype without conversion.
template <typename T>
CAPSOPS_INLINE bool is_native(Dtype dtype) {
    return dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
