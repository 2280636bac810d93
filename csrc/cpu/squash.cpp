// squash along any dimension of a tensor, which is seen as [outer, n, inner]: vectors of n numbers, `inner`
// apart.
#include "squash.h"

#include "dtype_convert.h"

namespace capsops {
namespace CAPSOPS_ISA {
namespace {

// Neighbouring vectors that are computed together when inner > 1.
constexpr int block = 16;

// How many contiguous vectors of n numbers are converted at a time: enough for vector instructions, few
// enough to stay in the first-level cache.
inline int64_t group_size(int64_t n) { return larger(1, 1024 / larger(1, n)); }

// Rows of n contiguous numbers. N is n if that is a common size, else 0.
template <typename T, bool Backward, int N>
void rows(const SquashCall& call, int64_t begin, int64_t end, T* s_row, T* g_row, T* out_row) {
    const int64_t n = N ? N : call.n;
    if (is_native<T>(call.dtype)) {
        const T* s = static_cast<const T*>(call.s);
        const T* g = static_cast<const T*>(call.grad);
        T* out = static_cast<T*>(call.out);
        for (int64_t row = begin; row < end; ++row) {
            if (Backward) {
                squash_vjp_row(s + row * n, g + row * n, n, out + row * n);
            } else {
                squash_row(s + row * n, n, out + row * n);
            }
        }
        return;
    }
    for (int64_t row = begin; row < end; row += group_size(n)) {
        const int64_t numbers = smaller(group_size(n), end - row) * n;
        read_row(call.s, call.dtype, row * n, numbers, s_row);
        if (Backward) read_row(call.grad, call.dtype, row * n, numbers, g_row);
        for (int64_t at = 0; at < numbers; at += n) {
            if (Backward) {
                squash_vjp_row(s_row + at, g_row + at, n, out_row + at);
            } else {
                squash_row(s_row + at, n, out_row + at);
            }
        }
        write_row(call.out, call.dtype, row * n, numbers, out_row);
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
    const int64_t vectors = call.inner > 1 ? block : is_native<T>(call.dtype) ? 0 : group_size(call.n);
    const int64_t scratch = call.n * vectors;
    Buffer buffer(scratch * 3 * threads * sizeof(T));
    if (!buffer.base) return false;
    T* pool = reinterpret_cast<T*>(buffer.base);
    run_team(threads, [&](const Team& team) {
        T* s = pool + scratch * 3 * team.rank;
        T *g = s + scratch, *out = g + scratch;
        if (call.inner == 1) {
            const int64_t begin = team.begin(call.outer), end = team.end(call.outer);
            switch (call.n) {
                case 4:
                    return rows<T, Backward, 4>(call, begin, end, s, g, out);
                case 8:
                    return rows<T, Backward, 8>(call, begin, end, s, g, out);
                case 16:
                    return rows<T, Backward, 16>(call, begin, end, s, g, out);
                case 32:
                    return rows<T, Backward, 32>(call, begin, end, s, g, out);
                default:
                    return rows<T, Backward, 0>(call, begin, end, s, g, out);
            }
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
