// squash along any dimension of a tensor, which is seen as [outer, n, inner]: vectors of n numbers, `inner`
// apart.
#include "squash.h"

#include "dtype_convert.h"
#include "short_rows.h"

namespace capsops {
namespace CAPSOPS_ISA {
namespace {

// Neighbouring vectors that are computed together when inner > 1.
constexpr int block = 16;

// squash of the N rows of n numbers at s; with Backward its vector-Jacobian product with g. The sums over a
// row and what follows from them are one register for all rows.
//
// Rows whose sum of squares is not safe are computed a second time, by themselves: so the result of a row
// does not depend on the rows beside it.
template <typename T, bool Backward>
struct Rows {
    static constexpr int N = vec_width<T>;

    struct Factors {
        Vec<T> f, h, inverse;  // h and 1 / r for the vector-Jacobian product
    };

    CAPSOPS_INLINE static Factors factors(Vec<T> square) {
        T root[N];
        store<T>(root, square);
#pragma omp simd
        for (int row = 0; row < N; ++row) root[row] = std::sqrt(root[row]);
        const Vec<T> r = load<T>(root), one = Vec<T>{} + T(1), q = one / (one + square);
        return {r * q, r * q * ((one - square) * q), one / r};
    }

    // n divides the lanes of a register.
    template <int n>
    CAPSOPS_INLINE static Vec<T> short_rows(const T* s, const T* g, T* out) {
        Vec<T> x[n], sums[n];
#pragma GCC unroll 16
        for (int q = 0; q < n; ++q) {
            x[q] = load<T>(s + q * N);
            sums[q] = x[q] * x[q];
        }
        const Vec<T> square = sum_rows<N, n>(sums);
        const Factors all = factors(square);
        if constexpr (!Backward) {
            for_registers<n>([&](auto q) { store<T>(out + q * N, spread_rows<N, n, q>(all.f) * x[q]); });
        } else {
            for_registers<n>([&](auto q) {
                x[q] *= spread_rows<N, n, q>(all.inverse);
                sums[q] = x[q] * load<T>(g + q * N);
            });
            const Vec<T> along = all.h * sum_rows<N, n>(sums);
            for_registers<n>([&](auto q) {
                store<T>(out + q * N, spread_rows<N, n, q>(all.f) * load<T>(g + q * N) +
                                          spread_rows<N, n, q>(along) * x[q]);
            });
        }
        return square;
    }

    // The sum of the products of a and scale · b for every row.
    CAPSOPS_INLINE static Vec<T> sums_of_products(const T* a, const T* b, int64_t n, Vec<T> scale) {
        if (n % N == 0) {
            Vec<T> total[N];
#pragma GCC unroll 16
            for (int row = 0; row < N; ++row) {
                total[row] = Vec<T>{};
                for (int64_t d = 0; d < n; d += N)
                    total[row] += load<T>(a + row * n + d) * (load<T>(b + row * n + d) * scale[row]);
            }
            return sum_lanes<N>(total);
        }
        T total[N];
        for (int row = 0; row < N; ++row) {
            T sum = 0;
            const T *a_row = a + row * n, *b_row = b + row * n, scale_of_row = scale[row];
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < n; ++d) sum += a_row[d] * (b_row[d] * scale_of_row);
            total[row] = sum;
        }
        return load<T>(total);
    }

    CAPSOPS_INLINE static Vec<T> long_rows(const T* s, const T* g, int64_t n, T* out) {
        const Vec<T> square = sums_of_products(s, s, n, Vec<T>{} + T(1));
        const Factors all = factors(square);
        const Vec<T> along = Backward ? all.h * sums_of_products(g, s, n, all.inverse) : Vec<T>{};
        for (int row = 0; row < N; ++row) {
            const T *s_row = s + row * n, *g_row = g + row * n;
            T* out_row = out + row * n;
            const T f = all.f[row], h = along[row], inverse = all.inverse[row];
            for (int64_t d = 0; d < n; ++d)
                out_row[d] = Backward ? f * g_row[d] + h * (s_row[d] * inverse) : f * s_row[d];
        }
        return square;
    }

    // Known: the length of a row if it is fixed at compile time, else 0.
    template <int Known>
    CAPSOPS_INLINE static void group(const T* s, const T* g, int64_t n, T* out) {
        Vec<T> square;
        if constexpr (Known > 0 && N % (Known ? Known : 1) == 0) {
            square = short_rows<Known>(s, g, out);
        } else {
            square = long_rows(s, g, Known ? Known : n, out);
        }
        const auto safe = (square > smallest_square<T>)&(square < largest_square<T>);
        if (over_lanes<N>(safe, [](auto a, auto b) { return a & b; })[0]) return;
        unsafe_rows(s, g, n, safe, out);
    }

    template <typename Mask>
    CAPSOPS_NOINLINE static void unsafe_rows(const T* s, const T* g, int64_t n, Mask safe, T* out) {
        for (int row = 0; row < N; ++row) {
            if (!safe[row]) one(s + row * n, g + (Backward ? row * n : 0), n, out + row * n);
        }
    }

    CAPSOPS_INLINE static void one(const T* s, const T* g, int64_t n, T* out) {
        if (Backward) {
            squash_vjp_row(s, g, n, out);
        } else {
            squash_row(s, n, out);
        }
    }
};

// Longer rows are computed one at a time: they fill registers by themselves, and groups would take much
// memory.
constexpr int64_t longest_in_groups = 256;

// How many rows have their place in the workspace: whole groups, and so many that 16-bit numbers are
// converted by vector instructions.
template <typename T>
int64_t rows_at_a_time(int64_t n) {
    return n > longest_in_groups ? 1 : round_up(larger(1, 1024 / n), vec_width<T>);
}

// Rows [begin, end) of n contiguous numbers. s_copy, g_copy and out_copy are workspace.
template <typename T, bool Backward, int Known>
void rows(const SquashCall& call, int64_t begin, int64_t end, T* s_copy, T* g_copy, T* out_copy) {
    const int64_t n = Known ? Known : call.n, group = n > longest_in_groups ? 1 : vec_width<T>;
    const auto compute = [&](const T* s, const T* g, T* out) {
        if (group > 1) {
            Rows<T, Backward>::template group<Known>(s, g, n, out);
        } else {
            Rows<T, Backward>::one(s, g, n, out);
        }
    };
    if (is_native<T>(call.dtype)) {
        const T *s = static_cast<const T*>(call.s), *g = static_cast<const T*>(call.grad);
        T* out = static_cast<T*>(call.out);
        for (; begin + group <= end; begin += group)
            compute(s + begin * n, Backward ? g + begin * n : nullptr, out + begin * n);
    }
    // Numbers to be converted, and the last rows where they do not fill a group.
    for (const int64_t step = rows_at_a_time<T>(n); begin < end; begin += step) {
        const int64_t numbers = smaller(step, end - begin) * n, filled = round_up(numbers, group * n);
        read_row(call.s, call.dtype, begin * n, numbers, s_copy);
        if (Backward) read_row(call.grad, call.dtype, begin * n, numbers, g_copy);
        for (int64_t at = numbers; at < filled; ++at) s_copy[at] = g_copy[at] = 1;
        for (int64_t at = 0; at < filled; at += group * n) compute(s_copy + at, g_copy + at, out_copy + at);
        write_row(call.out, call.dtype, begin * n, numbers, out_copy);
    }
}

// `width` neighbouring vectors, the first of which begins at `at`. s, g and out are workspace [n, block].
template <typename T, bool Backward>
void columns(const SquashCall& call, int64_t at, int64_t width, T* s, T* g, T* out) {
    const int64_t n = call.n;
    T square[block] = {}, along[block] = {}, f[block], h[block], divisor[block];
    bool overflows[block] = {};
    for (int64_t d = 0; d < n; ++d) {
        read_row(call.s, call.dtype, at + d * call.inner, width, s + d * block);
        if (Backward) read_row(call.grad, call.dtype, at + d * call.inner, width, g + d * block);
        for (int64_t w = 0; w < width; ++w) square[w] += s[d * block + w] * s[d * block + w];
    }
    for (int64_t w = 0; w < width; ++w) {
        const T r = length_from(s + w, n, block, square[w]);
        f[w] = squash_factor(r);
        overflows[w] = r > largest_square<T>;
        h[w] = squash_slope(r);
        divisor[w] = r == 0 ? T(1) : r;
    }
    if (Backward) {
        for (int64_t d = 0; d < n; ++d) {
            const T *s_d = s + d * block, *g_d = g + d * block;
            for (int64_t w = 0; w < width; ++w) along[w] += s_d[w] / divisor[w] * g_d[w];
        }
    }
    for (int64_t d = 0; d < n; ++d) {
        const T *s_d = s + d * block, *g_d = g + d * block;
        T* out_d = out + d * block;
        for (int64_t w = 0; w < width; ++w) {
            out_d[w] = Backward ? f[w] * g_d[w] + h[w] * along[w] * (s_d[w] / divisor[w]) : f[w] * s_d[w];
        }
    }
    for (int64_t w = 0; w < width; ++w) {
        if (!Backward && overflows[w]) direction(s + w, n, block, out + w);
    }
    for (int64_t d = 0; d < n; ++d) {
        write_row(call.out, call.dtype, at + d * call.inner, width, out + d * block);
    }
}

template <typename T, bool Backward>
bool squash_of(const SquashCall& call, int max_threads) {
    const int threads = call.outer * call.n * call.inner < 32768 ? 1 : max_threads;
    const int64_t scratch = call.n * (call.inner > 1 ? block : rows_at_a_time<T>(call.n));
    Buffer buffer(scratch * 3 * threads * sizeof(T));
    if (!buffer.base) return false;
    T* pool = reinterpret_cast<T*>(buffer.base);
    run_team(threads, [&](const Team& team) {
        T* s = pool + scratch * 3 * team.rank;
        T *g = s + scratch, *out = g + scratch;
        if (call.inner == 1) {
            const int64_t begin = team.begin(call.outer), end = team.end(call.outer);
            const bool is_short = with_short_rows<vec_width<T>>(
                call.n, [&](auto n) { rows<T, Backward, n>(call, begin, end, s, g, out); });
            if (is_short) return;
            if (call.n == 8) return rows<T, Backward, 8>(call, begin, end, s, g, out);
            if (call.n == 16) return rows<T, Backward, 16>(call, begin, end, s, g, out);
            return rows<T, Backward, 0>(call, begin, end, s, g, out);
        }
        const int64_t blocks = divide_up(call.inner, block);
        for (int64_t item = team.begin(call.outer * blocks); item < team.end(call.outer * blocks); ++item) {
            const int64_t first = item % blocks * block;
            const int64_t at = item / blocks * call.n * call.inner + first;
            columns<T, Backward>(call, at, smaller(block, call.inner - first), s, g, out);
        }
    });
    return true;
}

}  // namespace

bool squash(const SquashCall& call, int threads) {
    return call.dtype == Dtype::float64 ? squash_of<double, false>(call, threads)
                                        : squash_of<float, false>(call, threads);
}

bool squash_backward(const SquashCall& call, int threads) {
    return call.dtype == Dtype::float64 ? squash_of<double, true>(call, threads)
                                        : squash_of<float, true>(call, threads);
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
