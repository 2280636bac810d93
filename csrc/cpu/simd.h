// SIMD registers of the instruction set that this file is compiled for, by the compiler's vector types.
//
// Instruction sets must not share code. So everything here is in the namespace of the instruction set that it
// is compiled for, and the kernels use no function templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define CAPSOPS_ALWAYS __attribute__((always_inline))
#define CAPSOPS_INLINE inline CAPSOPS_ALWAYS
#define CAPSOPS_NOINLINE __attribute__((noinline))

namespace capsops {
namespace CAPSOPS_ISA {

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
constexpr int registers_per_lane_group = 1;
constexpr int rows_per_tile = 16;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
constexpr int registers_per_lane_group = 2;
constexpr int rows_per_tile = 4;
#else
constexpr int register_bytes = 16;
constexpr int registers_per_lane_group = 2;
constexpr int rows_per_tile = 4;
#endif

template <typename T, int N>
struct VecOf;

template <int N>
struct VecOf<float, N> {
    typedef float Vec __attribute__((vector_size(N * 4)));
    typedef float Unaligned __attribute__((vector_size(N * 4), aligned(4), may_alias));
    typedef int32_t Int __attribute__((vector_size(N * 4)));
};

template <int N>
struct VecOf<double, N> {
    typedef double Vec __attribute__((vector_size(N * 8)));
    typedef double Unaligned __attribute__((vector_size(N * 8), aligned(8), may_alias));
    typedef int64_t Int __attribute__((vector_size(N * 8)));
};

// Lanes of one register.
template <typename T>
constexpr int vec_width = register_bytes / int(sizeof(T));

// Samples of the batch in one lane group.
template <typename T>
constexpr int lane_group = vec_width<T> * registers_per_lane_group;

template <typename T, int N = vec_width<T>>
using Vec = typename VecOf<T, N>::Vec;

template <typename T, int N = vec_width<T>>
CAPSOPS_INLINE Vec<T, N> load(const T* p) {
    return *reinterpret_cast<const typename VecOf<T, N>::Unaligned*>(p);
}

template <typename T, int N = vec_width<T>>
CAPSOPS_INLINE void store(T* p, Vec<T, N> x) {
    *reinterpret_cast<typename VecOf<T, N>::Unaligned*>(p) = x;
}

// Has no effect but on time, whatever the address.
CAPSOPS_INLINE void fetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

template <typename V, int... At>
CAPSOPS_INLINE V shuffle(V a, V b, std::integer_sequence<int, At...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, At...);
#else
    typedef typename std::conditional<sizeof(a[0]) == 4, int32_t, int64_t>::type Index;
    typedef Index Mask __attribute__((vector_size(sizeof(V))));
    return __builtin_shuffle(a, b, Mask{At...});
#endif
}

// The indices by which rows r and r + Step of a square exchange blocks when the square is transposed.
template <int N, int Step, bool Upper>
struct Exchange {
    template <int... At>
    static constexpr auto indices(std::integer_sequence<int, At...>) {
        return std::integer_sequence<int, (Upper ? ((At & Step) ? N + At : At + Step)
                                                 : ((At & Step) ? N + At - Step : At))...>{};
    }
    using type = decltype(indices(std::make_integer_sequence<int, N>{}));
};

template <int N, int Step, typename V>
CAPSOPS_INLINE void transpose_step(V* rows) {
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r) {
        if (r & Step) continue;
        const V a = rows[r], b = rows[r + Step];
        rows[r] = shuffle(a, b, typename Exchange<N, Step, false>::type{});
        rows[r + Step] = shuffle(a, b, typename Exchange<N, Step, true>::type{});
    }
}

// Transposes the N × N numbers in N registers of N lanes.
template <int N, typename V>
CAPSOPS_INLINE void transpose(V* rows) {
    if constexpr (N >= 16) transpose_step<N, 8>(rows);
    if constexpr (N >= 8) transpose_step<N, 4>(rows);
    if constexpr (N >= 4) transpose_step<N, 2>(rows);
    if constexpr (N >= 2) transpose_step<N, 1>(rows);
}

// Halves the number of rows. Row r becomes the sum over pairs of lanes that differ in bit Step: of row r in
// the lanes without that bit, of row r + Step in the lanes with it.
template <int N, int Step, typename V>
CAPSOPS_INLINE void fold_step(V* rows) {
#pragma GCC unroll 16
    for (int r = 0; r < Step; ++r) {
        const V a = rows[r], b = rows[r + Step];
        rows[r] = shuffle(a, b, typename Exchange<N, Step, false>::type{}) +
                  shuffle(a, b, typename Exchange<N, Step, true>::type{});
    }
}

// Sums over the lanes of each of N registers. Lane n of the result is the sum of rows[n].
template <int N, typename V>
CAPSOPS_INLINE V sum_lanes(V* rows) {
    if constexpr (N >= 16) fold_step<N, 8>(rows);
    if constexpr (N >= 8) fold_step<N, 4>(rows);
    if constexpr (N >= 4) fold_step<N, 2>(rows);
    if constexpr (N >= 2) fold_step<N, 1>(rows);
    return rows[0];
}

template <typename Int, typename Index, int... At>
CAPSOPS_INLINE Int iota(std::integer_sequence<int, At...>) {
    return Int{Index(At)...};
}

template <int N, int Step, typename V, int... At>
CAPSOPS_INLINE V exchanged(V x, std::integer_sequence<int, At...>) {
    return shuffle(x, x, std::integer_sequence<int, (At ^ Step)...>{});
}

// Combines all lanes by `join`; every lane of the result has the same value.
template <int N, typename V, typename Join>
CAPSOPS_INLINE V over_lanes(V x, const Join& join) {
    constexpr auto all = std::make_integer_sequence<int, N>{};
    if constexpr (N >= 16) x = join(x, exchanged<N, 8>(x, all));
    if constexpr (N >= 8) x = join(x, exchanged<N, 4>(x, all));
    if constexpr (N >= 4) x = join(x, exchanged<N, 2>(x, all));
    if constexpr (N >= 2) x = join(x, exchanged<N, 1>(x, all));
    return x;
}

template <typename T, int N = vec_width<T>>
CAPSOPS_INLINE T sum(Vec<T, N> x) {
    T total = 0;
    for (int lane = 0; lane < N; ++lane) total += x[lane];
    return total;
}

template <typename V>
CAPSOPS_INLINE V maximum(V a, V b) {
    return a > b ? a : b;
}

// e^x for x <= 0 or NaN; 0 where the result would be subnormal. x = n ln 2 + r with |r| <= ln 2 / 2, and e^r
// by its Taylor series. Accurate to one or two units in the last place.
template <int N>
CAPSOPS_INLINE Vec<float, N> exp_nonpositive(Vec<float, N> x, float) {
    typedef typename VecOf<float, N>::Int Int;
    const Vec<float, N> floor = Vec<float, N>{} - 88.02f;  // n = -127, for which 2^n is computed as 0
    x = x < floor ? floor : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vec<float, N> shifted = x * 1.44269504088896341f + magic;
    const Vec<float, N> n = shifted - magic;
    Vec<float, N> r = x - n * 0.693359375f;
    r = r + n * 2.12194440054690583e-4f;
    Vec<float, N> p = Vec<float, N>{} + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Int bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - (0x4b400000 - 127)) << 23;
    Vec<float, N> scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return p * scale;
}

template <int N>
CAPSOPS_INLINE Vec<double, N> exp_nonpositive(Vec<double, N> x, double) {
    typedef typename VecOf<double, N>::Int Int;
    const Vec<double, N> floor = Vec<double, N>{} - 709.0;  // n = -1023, for which 2^n is computed as 0
    x = x < floor ? floor : x;
    const double magic = 6755399441055744.0;  // 1.5 * 2^52
    const Vec<double, N> shifted = x * 1.44269504088896340736 + magic;
    const Vec<double, N> n = shifted - magic;
    Vec<double, N> r = x - n * 6.93147180369123816490e-01;
    r = r - n * 1.90821492927058770002e-10;
    Vec<double, N> p = Vec<double, N>{} + 1.0 / 6227020800.0;
    constexpr double factorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0,
                                     120.0,       24.0,       6.0,       2.0,      1.0,     1.0};
    for (double factorial : factorials) p = p * r + 1.0 / factorial;
    Int bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - (0x4338000000000000 - 1023)) << 52;
    Vec<double, N> scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return p * scale;
}

// One number of every sample of a lane group.
template <typename T>
struct Lanes {
    static constexpr int registers = registers_per_lane_group;
    static constexpr int size = lane_group<T>;
    Vec<T> part[registers];

    CAPSOPS_INLINE static Lanes filled(T x) {
        Lanes y;
        for (int n = 0; n < registers; ++n) y.part[n] = Vec<T>{} + x;
        return y;
    }
    CAPSOPS_INLINE Lanes& operator+=(const Lanes& x) {
        for (int n = 0; n < registers; ++n) part[n] += x.part[n];
        return *this;
    }
};

template <typename T>
CAPSOPS_INLINE Lanes<T> operator*(const Lanes<T>& a, const Lanes<T>& b) {
    Lanes<T> y;
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] = a.part[n] * b.part[n];
    return y;
}

template <typename T>
CAPSOPS_INLINE Lanes<T> operator-(const Lanes<T>& a, const Lanes<T>& b) {
    Lanes<T> y;
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] = a.part[n] - b.part[n];
    return y;
}

template <typename T>
CAPSOPS_INLINE Lanes<T> operator/(const Lanes<T>& a, const Lanes<T>& b) {
    Lanes<T> y;
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] = a.part[n] / b.part[n];
    return y;
}

template <typename T>
CAPSOPS_INLINE Lanes<T> maximum(const Lanes<T>& a, const Lanes<T>& b) {
    Lanes<T> y;
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] = maximum(a.part[n], b.part[n]);
    return y;
}

template <typename T>
CAPSOPS_INLINE Lanes<T> exp_nonpositive(const Lanes<T>& x) {
    Lanes<T> y;
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] = exp_nonpositive<vec_width<T>>(x.part[n], T());
    return y;
}

template <typename T>
CAPSOPS_INLINE Lanes<T> operator+(const Lanes<T>& a, const Lanes<T>& b) {
    Lanes<T> y;
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] = a.part[n] + b.part[n];
    return y;
}

template <typename T>
CAPSOPS_INLINE Lanes<T> product(T a, const Lanes<T>& x) {
    Lanes<T> y;
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] = a * x.part[n];
    return y;
}

// y += a x
template <typename T>
CAPSOPS_INLINE void add_product(Lanes<T>& y, T a, const Lanes<T>& x) {
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] += a * x.part[n];
}

template <typename T>
CAPSOPS_INLINE void add_product(Lanes<T>& y, const Lanes<T>& a, const Lanes<T>& x) {
    for (int n = 0; n < Lanes<T>::registers; ++n) y.part[n] += a.part[n] * x.part[n];
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
