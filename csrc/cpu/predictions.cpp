// û_ij = W_ij u_i and its gradients: for every i a product of small matrices.
//
// W_i is transposed to [K, J·D] once for each i, so that û_i of one sample, J·D contiguous numbers, consists
// of whole registers: û_i = Σ_k u_ik W_i[k], ∂u_ik = Σ_jd ∂û W_i[k], and ∂W_i[k] = Σ_b u_ik ∂û_i.
#include "dtype_convert.h"
#include "threading.h"

namespace capsops {
namespace CAPSOPS_ISA {
namespace {

template <typename T>
struct Scratch {
    int64_t padded;  // J·D rounded up to whole registers
    T* transposed;   // W_i or ∂W_i as [K, padded]
    T* weight;       // W_i or ∂W_i as [J·D, K]
    T* row;          // one sample's û_i or ∂û_i
    T* capsule;      // one sample's u_i or ∂u_i, padded to whole registers

    static Scratch plan(Arena& arena, int64_t R, int64_t K) {
        Scratch scratch;
        scratch.padded = round_up(R, vec_width<T>);
        scratch.transposed = arena.take<T>(K * scratch.padded);
        scratch.weight = arena.take<T>(R * K);
        scratch.row = arena.take<T>(scratch.padded);
        scratch.capsule = arena.take<T>(round_up(K, vec_width<T>));
        return scratch;
    }
};

template <typename T>
void transpose_weight(const PredictionsCall& call, int64_t i, const Scratch<T>& scratch) {
    const int64_t R = call.J * call.D, K = call.K;
    read_row(call.weight, call.dtype, i * R * K, R * K, scratch.weight);
    for (int64_t k = 0; k < K; ++k) {
        T* row = scratch.transposed + k * scratch.padded;
        for (int64_t r = 0; r < R; ++r) row[r] = scratch.weight[r * K + k];
        for (int64_t r = R; r < scratch.padded; ++r) row[r] = 0;
    }
}

// Output registers that are computed together, so that the latencies of their sums overlap.
constexpr int registers_per_tile = 5;

template <typename T, int Count>
CAPSOPS_INLINE void predict_registers(const T* transposed, int64_t padded, const T* u, int64_t K, T* out) {
    Vec<T> total[Count];
    for (int n = 0; n < Count; ++n) total[n] = Vec<T>{};
    for (int64_t k = 0; k < K; ++k) {
#pragma GCC unroll 8
        for (int n = 0; n < Count; ++n)
            total[n] += u[k] * load<T>(transposed + k * padded + n * vec_width<T>);
    }
    for (int n = 0; n < Count; ++n) store<T>(out + n * vec_width<T>, total[n]);
}

template <typename T>
void predict(const PredictionsCall& call, int64_t b, int64_t i, const Scratch<T>& scratch) {
    const int64_t R = call.J * call.D, K = call.K;
    read_row(call.u, call.dtype, (b * call.I + i) * K, K, scratch.capsule);
    const bool direct = is_native<T>(call.dtype) && scratch.padded == R;
    T* out = direct ? static_cast<T*>(call.u_hat) + (b * call.I + i) * R : scratch.row;
    int64_t r = 0;
    for (; r + registers_per_tile * vec_width<T> <= scratch.padded; r += registers_per_tile * vec_width<T>) {
        predict_registers<T, registers_per_tile>(scratch.transposed + r, scratch.padded, scratch.capsule, K,
                                                 out + r);
    }
    for (; r < scratch.padded; r += vec_width<T>) {
        predict_registers<T, 1>(scratch.transposed + r, scratch.padded, scratch.capsule, K, out + r);
    }
    if (!direct) write_row(call.u_hat, call.dtype, (b * call.I + i) * R, R, scratch.row);
}

// ∂û_i of one sample, padded with zeros to whole registers.
template <typename T>
const T* gradient_row(const PredictionsCall& call, int64_t b, int64_t i, const Scratch<T>& scratch) {
    const int64_t R = call.J * call.D, at = (b * call.I + i) * R;
    if (is_native<T>(call.dtype) && scratch.padded == R) return static_cast<const T*>(call.grad) + at;
    read_row(call.grad, call.dtype, at, R, scratch.row);
    for (int64_t r = R; r < scratch.padded; ++r) scratch.row[r] = 0;
    return scratch.row;
}

template <typename T>
void gradient_of_u(const PredictionsCall& call, int64_t b, int64_t i, const Scratch<T>& scratch) {
    constexpr int width = vec_width<T>;
    const T* row = gradient_row(call, b, i, scratch);
    for (int64_t first = 0; first < call.K; first += width) {
        Vec<T> total[width];
        const int64_t count = smaller(width, call.K - first);
        for (int64_t n = 0; n < width; ++n) total[n] = Vec<T>{};
        for (int64_t n = 0; n < count; ++n) {
            const T* transposed = scratch.transposed + (first + n) * scratch.padded;
            Vec<T> one = Vec<T>{}, other = Vec<T>{};
            int64_t r = 0;
            for (; r + 2 * width <= scratch.padded; r += 2 * width) {
                one += load<T>(row + r) * load<T>(transposed + r);
                other += load<T>(row + r + width) * load<T>(transposed + r + width);
            }
            if (r < scratch.padded) one += load<T>(row + r) * load<T>(transposed + r);
            total[n] = one + other;
        }
        store<T>(scratch.capsule + first, sum_lanes<width>(total));
    }
    write_row(call.grad_u, call.dtype, (b * call.I + i) * call.K, call.K, scratch.capsule);
}

template <typename T>
void gradient_of_weight(const PredictionsCall& call, int64_t i, const Scratch<T>& scratch) {
    constexpr int rows = 8, width = vec_width<T>;
    const int64_t R = call.J * call.D, K = call.K, padded = scratch.padded;
    std::memset(scratch.transposed, 0, K * padded * sizeof(T));
    for (int64_t b = 0; b < call.B; ++b) {
        const T* row = gradient_row(call, b, i, scratch);
        read_row(call.u, call.dtype, (b * call.I + i) * K, K, scratch.capsule);
        for (int64_t first = 0; first < K; first += rows) {
            const int64_t count = smaller(rows, K - first);
            T* transposed = scratch.transposed + first * padded;
            for (int64_t r = 0; r < padded; r += width) {
                const Vec<T> g = load<T>(row + r);
                for (int64_t n = 0; n < count; ++n) {
                    T* p = transposed + n * padded + r;
                    store<T>(p, load<T>(p) + scratch.capsule[first + n] * g);
                }
            }
        }
    }
    for (int64_t r = 0; r < R; ++r) {
        for (int64_t k = 0; k < K; ++k) scratch.weight[r * K + k] = scratch.transposed[k * padded + r];
    }
    write_row(call.grad_weight, call.dtype, i * R * K, R * K, scratch.weight);
}

// Calls work(i, b, scratch) for this thread's share of all pairs (i, b). W_i is transposed in scratch.
template <typename T, typename Work>
void for_pairs(const PredictionsCall& call, const Team& team, const Scratch<T>& scratch, const Work& work) {
    int64_t current = -1;  // whose W_i is in scratch
    for (int64_t pair = team.begin(call.I * call.B); pair < team.end(call.I * call.B); ++pair) {
        const int64_t i = pair / call.B, b = pair % call.B;
        if (i != current) transpose_weight(call, i, scratch);
        current = i;
        work(i, b, scratch);
    }
}

template <typename T, typename Work>
bool with_scratch(const PredictionsCall& call, int max_threads, const Work& work) {
    const int threads = call.B * call.I * call.J * call.D * call.K < 65536 ? 1 : max_threads;
    Arena scratch_size;
    Scratch<T>::plan(scratch_size, call.J * call.D, call.K);
    Buffer buffer(scratch_size.used() * threads);
    if (!buffer.base) return false;
    run_team(threads, [&](const Team& team) {
        Arena own(buffer.base + scratch_size.used() * team.rank);
        work(team, Scratch<T>::plan(own, call.J * call.D, call.K));
    });
    return true;
}

template <typename T>
bool forward(const PredictionsCall& call, int threads) {
    return with_scratch<T>(call, threads, [&](const Team& team, const Scratch<T>& scratch) {
        for_pairs<T>(call, team, scratch,
                     [&](int64_t i, int64_t b, const Scratch<T>& s) { predict(call, b, i, s); });
    });
}

template <typename T>
bool backward(const PredictionsCall& call, int threads) {
    return with_scratch<T>(call, threads, [&](const Team& team, const Scratch<T>& scratch) {
        if (call.grad_u) {
            for_pairs<T>(call, team, scratch,
                         [&](int64_t i, int64_t b, const Scratch<T>& s) { gradient_of_u(call, b, i, s); });
        }
        if (call.grad_weight) {
            for (int64_t i = team.begin(call.I); i < team.end(call.I); ++i)
                gradient_of_weight(call, i, scratch);
        }
    });
}

}  // namespace

bool predictions(const PredictionsCall& call, int threads) {
    return call.dtype == Dtype::float64 ? forward<double>(call, threads) : forward<float>(call, threads);
}

bool predictions_backward(const PredictionsCall& call, int threads) {
    return call.dtype == Dtype::float64 ? backward<double>(call, threads) : backward<float>(call, threads);
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
