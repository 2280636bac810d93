// Rows of n numbers that follow one another in memory, where n divides the lanes of a register.
//
// n registers hold N rows: lane g·n + k of register q is number k of row q·N/n + g.
#pragma once

#include "simd.h"

namespace capsops {
namespace CAPSOPS_ISA {

// The source of lane `at` when rows are put in order: the exchanges leave row q·N/n + g in lane g·n + q.
template <int N, int n>
struct InOrder {
    static constexpr int lane(int at) { return at % (N / n) * n + at / (N / n); }
};

// Which row lane `at` of register q belongs to.
template <int N, int n, int q>
struct RowOf {
    static constexpr int lane(int at) { return q * (N / n) + at / n; }
};

template <typename Rule, typename V, int... At>
CAPSOPS_INLINE V rearranged(V x, std::integer_sequence<int, At...>) {
    return shuffle(x, x, std::integer_sequence<int, Rule::lane(At)...>{});
}

template <int N, int n, typename V>
CAPSOPS_INLINE V in_order(V x) {
    if constexpr (n == 1 || n == N) {
        return x;
    } else {
        return rearranged<InOrder<N, n>>(x, std::make_integer_sequence<int, N>{});
    }
}

// The sum of every row, row r in lane r.
template <int N, int n, typename V>
CAPSOPS_INLINE V sum_rows(V* rows) {
    if constexpr (n >= 16) fold_step<N, 8>(rows);
    if constexpr (n >= 8) fold_step<N, 4>(rows);
    if constexpr (n >= 4) fold_step<N, 2>(rows);
    if constexpr (n >= 2) fold_step<N, 1>(rows);
    return in_order<N, n>(rows[0]);
}

// Lane r of x in all lanes of register q that belong to row r.
template <int N, int n, int q, typename V>
CAPSOPS_INLINE V spread_rows(V x) {
    if constexpr (n == 1) {
        return x;
    } else {
        return rearranged<RowOf<N, n, q>>(x, std::make_integer_sequence<int, N>{});
    }
}

// Calls work(q) for every register q, a constant of its type.
template <typename Work, int... q>
CAPSOPS_INLINE void for_registers(const Work& work, std::integer_sequence<int, q...>) {
    (work(std::integral_constant<int, q>{}), ...);
}

template <int n, typename Work>
CAPSOPS_INLINE void for_registers(const Work& work) {
    for_registers(work, std::make_integer_sequence<int, n>{});
}

template <int N, int n, int Step, typename V>
CAPSOPS_INLINE void exchange_step(V* rows) {
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r) {
        if (r & Step) continue;
        const V a = rows[r], b = rows[r + Step];
        rows[r] = shuffle(a, b, typename Exchange<N, Step, false>::type{});
        rows[r + Step] = shuffle(a, b, typename Exchange<N, Step, true>::type{});
    }
}

// Register k becomes number k of every row, row r in lane r.
template <int N, int n, typename V>
CAPSOPS_INLINE void transpose_rows(V* rows) {
    if constexpr (n >= 16) exchange_step<N, n, 8>(rows);
    if constexpr (n >= 8) exchange_step<N, n, 4>(rows);
    if constexpr (n >= 4) exchange_step<N, n, 2>(rows);
    if constexpr (n >= 2) exchange_step<N, n, 1>(rows);
#pragma GCC unroll 16
    for (int r = 0; r < n; ++r) rows[r] = in_order<N, n>(rows[r]);
}

// Calls work(n), a constant of its type, where rows of n numbers are such rows: a power of two up to N.
template <int N, typename Work>
CAPSOPS_INLINE bool with_short_rows(int64_t n, const Work& work) {
    switch (n) {
        case 1:
            work(std::integral_constant<int, 1>{});
            return true;
        case 2:
            work(std::integral_constant<int, 2>{});
            return true;
        case 4:
            if constexpr (N >= 4) work(std::integral_constant<int, 4>{});
            return N >= 4;
        case 8:
            if constexpr (N >= 8) work(std::integral_constant<int, 8>{});
            return N >= 8;
        case 16:
            if constexpr (N >= 16) work(std::integral_constant<int, 16>{});
            return N >= 16;
        default:
            return false;
    }
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
