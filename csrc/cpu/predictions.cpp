// û_ij = W_ij u_i and its gradients: for every i a product of small matrices.
//
// Forward, W_i is transposed to [K, J·D] once for each i, so that û_i of one sample, J·D contiguous numbers,
// consists of whole registers: û_i = Σ_k u_ik W_i[k]. For a few samples that is not worth it: W_i is
// multiplied by u_i as it lies in memory, and sums over k are sums over lanes.
//
// Backward, W_i stays [J·D, K], and ∂û_i is spread over the lanes instead, every number K times: with that,
// ∂u_ik = Σ_jd ∂û_ijd W_ijdk and ∂W_ijdk = Σ_b ∂û_ijd u_ik need no sums over lanes but the last one.
#include "dtype_convert.h"
#include "short_rows.h"
#include "threading.h"
#include "transpose.h"

namespace capsops {
namespace CAPSOPS_ISA {
namespace {

// At most so many input capsules are computed together: their numbers of one sample are neighbours in memory,
// so each read and write covers a longer range.
constexpr int64_t most_capsules = 8;
// Up to so many samples W_i is used as it is in memory.
constexpr int64_t few_samples = 2;
// ∂W is fetched into the cache so many bytes before it is written.
constexpr int64_t fetched_ahead = 5120;

// How many input capsules are computed together: their W fits in the second-level cache.
template <typename T>
int64_t capsules_at_a_time(const PredictionsCall& call) {
    const int64_t bytes = call.J * call.D * call.K * int64_t(sizeof(T));
    return larger(1, smaller(smaller(most_capsules, call.I), (int64_t(1) << 18) / bytes));
}

// K rounded up to numbers that fill a register evenly: a power of two, or whole registers.
template <typename T>
int64_t padded_depth(int64_t K) {
    if (K > vec_width<T>) return round_up(K, vec_width<T>);
    int64_t depth = 1;
    while (depth < K) depth *= 2;
    return depth;
}

// ---------------------------------------------------------------- forward

template <typename T>
struct ForwardScratch {
    int64_t padded;  // J·D rounded up to whole registers
    T* transposed;   // W of some input capsules [capsules_at_a_time, K, padded]
    T* weight;       // W_i as [padded, K]
    T* rows;         // û_i of two samples
    T* capsules;     // u_i of two samples, K each

    static ForwardScratch plan(Arena& arena, const PredictionsCall& call) {
        const int64_t R = call.J * call.D;
        ForwardScratch scratch;
        scratch.padded = round_up(R, vec_width<T>);
        scratch.transposed = arena.take<T>(capsules_at_a_time<T>(call) * call.K * scratch.padded);
        scratch.weight = arena.take<T>(scratch.padded * call.K);
        scratch.rows = arena.take<T>(2 * scratch.padded);
        scratch.capsules = arena.take<T>(2 * larger(call.K, vec_width<T>));
        return scratch;
    }
};

// W_i as [J·D, K], converted if need be, with zeros up to `padded` rows.
template <typename T>
const T* weight_rows(const PredictionsCall& call, int64_t i, int64_t padded, T* copy) {
    const int64_t R = call.J * call.D, K = call.K;
    if (is_native<T>(call.dtype) && padded == R) return static_cast<const T*>(call.weight) + i * R * K;
    read_row(call.weight, call.dtype, i * R * K, R * K, copy);
    for (int64_t at = R * K; at < padded * K; ++at) copy[at] = 0;
    return copy;
}

template <typename T, int n>
void transpose_short_rows(const T* weight, int64_t rows, T* transposed) {
    constexpr int N = vec_width<T>;
    for (int64_t r = 0; r < rows; r += N) {
        Vec<T> x[n];
#pragma GCC unroll 16
        for (int q = 0; q < n; ++q) x[q] = load<T>(weight + r * n + q * N);
        transpose_rows<N, n>(x);
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) store<T>(transposed + k * rows + r, x[k]);
    }
}

template <typename T>
void transpose_weight(const PredictionsCall& call, int64_t i, const ForwardScratch<T>& scratch,
                      T* transposed) {
    const int64_t K = call.K, padded = scratch.padded;
    const T* weight = weight_rows(call, i, padded, scratch.weight);
    const bool is_short = with_short_rows<vec_width<T>>(
        K, [&](auto n) { transpose_short_rows<T, n>(weight, padded, transposed); });
    if (!is_short) transpose_block(weight, K, padded, K, transposed, padded);
}

template <typename T, int Registers, int Samples>
CAPSOPS_INLINE void predict_registers(const T* transposed, int64_t padded, const T* u, int64_t K,
                                      T* const* out) {
    Vec<T> total[Samples][Registers];
    for (int m = 0; m < Samples; ++m) {
        for (int n = 0; n < Registers; ++n) total[m][n] = Vec<T>{};
    }
    for (int64_t k = 0; k < K; ++k) {
#pragma GCC unroll 8
        for (int n = 0; n < Registers; ++n) {
            const Vec<T> w = load<T>(transposed + k * padded + n * vec_width<T>);
            for (int m = 0; m < Samples; ++m) total[m][n] += u[m * K + k] * w;
        }
    }
    for (int m = 0; m < Samples; ++m) {
        for (int n = 0; n < Registers; ++n) store<T>(out[m] + n * vec_width<T>, total[m][n]);
    }
}

// û_i of the samples b, b + 1, …
template <typename T, int Samples>
void predict(const PredictionsCall& call, int64_t b, int64_t i, const T* transposed,
             const ForwardScratch<T>& scratch) {
    constexpr int registers = 5;  // computed together, so that the latencies of their sums overlap
    const int64_t R = call.J * call.D, K = call.K, padded = scratch.padded;
    const bool direct = is_native<T>(call.u_hat_dtype) && padded == R;
    T* out[Samples];
    for (int m = 0; m < Samples; ++m) {
        const int64_t capsule = (b + m) * call.I + i;
        read_row(call.u, call.dtype, capsule * K, K, scratch.capsules + m * K);
        out[m] = direct ? static_cast<T*>(call.u_hat) + capsule * R : scratch.rows + m * padded;
    }
    int64_t r = 0;
    const auto advance = [&](int64_t by) {
        r += by;
        for (int m = 0; m < Samples; ++m) out[m] += by;
    };
    while (r + registers * vec_width<T> <= padded) {
        predict_registers<T, registers, Samples>(transposed + r, padded, scratch.capsules, K, out);
        advance(registers * vec_width<T>);
    }
    while (r < padded) {
        predict_registers<T, 1, Samples>(transposed + r, padded, scratch.capsules, K, out);
        advance(vec_width<T>);
    }
    for (int m = 0; m < Samples && !direct; ++m)
        write_row(call.u_hat, call.u_hat_dtype, ((b + m) * call.I + i) * R, R, scratch.rows + m * padded);
}

// This thread's share of û, by way of the transposed W_i.
template <typename T>
void predict_transposed(const PredictionsCall& call, const Team& team, const ForwardScratch<T>& scratch) {
    constexpr int64_t samples = 8;  // one item of work: so many samples of a few input capsules
    const int64_t together = larger(1, smaller(capsules_at_a_time<T>(call), call.I / team.size));
    const int64_t chunks = divide_up(call.B, samples), blocks = divide_up(call.I, together);
    const int64_t size = call.K * scratch.padded;
    int64_t current = -1;  // the block whose W is in scratch
    for (int64_t item = team.begin(blocks * chunks); item < team.end(blocks * chunks); ++item) {
        const int64_t block = item / chunks, first = block * together;
        const int64_t count = smaller(together, call.I - first);
        for (int64_t n = 0; n < count && block != current; ++n)
            transpose_weight(call, first + n, scratch, scratch.transposed + n * size);
        current = block;
        const int64_t end = smaller(call.B, (item % chunks + 1) * samples);
        int64_t b = item % chunks * samples;
        for (; b + 2 <= end; b += 2) {
            for (int64_t n = 0; n < count; ++n)
                predict<T, 2>(call, b, first + n, scratch.transposed + n * size, scratch);
        }
        for (int64_t n = 0; n < count && b < end; ++n)
            predict<T, 1>(call, b, first + n, scratch.transposed + n * size, scratch);
    }
}

// The same without transposing. K is n, which divides the lanes of a register.
template <typename T, int n>
void predict_in_place(const PredictionsCall& call, const Team& team, const ForwardScratch<T>& scratch) {
    constexpr int N = vec_width<T>;
    const int64_t R = call.J * call.D, padded = scratch.padded;
    const bool direct = is_native<T>(call.u_hat_dtype) && padded == R;
    for (int64_t i = team.begin(call.I); i < team.end(call.I); ++i) {
        const T* weight = weight_rows(call, i, padded, scratch.weight);
        for (int64_t b = 0; b < call.B; ++b) {
            const int64_t capsule = b * call.I + i;
            read_row(call.u, call.dtype, capsule * n, n, scratch.capsules);
            for (int at = n; at < N; ++at) scratch.capsules[at] = scratch.capsules[at - n];
            const Vec<T> u = load<T>(scratch.capsules);
            T* out = direct ? static_cast<T*>(call.u_hat) + capsule * R : scratch.rows;
            for (int64_t r = 0; r < padded; r += N) {
                Vec<T> products[n];
#pragma GCC unroll 16
                for (int q = 0; q < n; ++q) products[q] = u * load<T>(weight + r * n + q * N);
                store<T>(out + r, sum_rows<N, n>(products));
            }
            if (!direct) write_row(call.u_hat, call.u_hat_dtype, capsule * R, R, scratch.rows);
        }
    }
}

// ---------------------------------------------------------------- backward

constexpr int samples_at_a_time = 4;

template <typename T>
struct BackwardScratch {
    int64_t padded;  // J·D rounded up to whole registers
    int64_t depth;   // padded_depth of K
    T* weight;       // W of some input capsules [capsules_at_a_time, padded, depth]
    T* grad_weight;  // likewise ∂W
    T* rows;         // ∂û_i of a few samples [samples_at_a_time, padded]
    T* capsules;     // u_i of a few samples, each repeated or padded to whole registers
    T* grad_u;       // ∂u_i of one sample, as in `capsules`

    static BackwardScratch plan(Arena& arena, const PredictionsCall& call) {
        BackwardScratch scratch;
        scratch.padded = round_up(call.J * call.D, vec_width<T>);
        scratch.depth = padded_depth<T>(call.K);
        scratch.weight = arena.take<T>(capsules_at_a_time<T>(call) * scratch.padded * scratch.depth);
        scratch.grad_weight = arena.take<T>(capsules_at_a_time<T>(call) * scratch.padded * scratch.depth);
        scratch.rows = arena.take<T>(samples_at_a_time * scratch.padded);
        scratch.capsules = arena.take<T>(samples_at_a_time * larger(scratch.depth, vec_width<T>));
        scratch.grad_u = arena.take<T>(samples_at_a_time * larger(scratch.depth, vec_width<T>));
        return scratch;
    }

    int64_t size() const { return padded * depth; }
    // Numbers of a sample in `capsules` and `grad_u`.
    int64_t lanes() const { return larger(depth, vec_width<T>); }
};

// What a tile computes with: rows of ∂û, W and ∂W (or null) from `row` on, and the sums.
template <typename T>
struct Tile {
    const T* grad[samples_at_a_time];  // ∂û_i of each sample
    const T* u;
    const T* weight;
    T* grad_weight;
    T* grad_u;
    int64_t lanes, depth;
    int64_t begin, end;  // rows, in whole registers
    bool first;          // whether ∂W starts here
};

// ∂u_i and ∂W_i of a few samples. n of the `depth` numbers of a row of W lie in one register, beside
// those of other rows if n is not all its lanes.
template <typename T, int n, int Samples, bool OfU, bool OfWeight>
CAPSOPS_NOINLINE void gradients(const Tile<T>& tile) {
    constexpr int N = vec_width<T>;
    // ∂u is summed over so many rows at a time; partial sums have smaller rounding errors.
    constexpr int64_t rows = 64;
    // Sums of one sample by turns, so that their latencies overlap.
    constexpr int turns = Samples == 1 && n > 1 ? 2 : 1;
    const int64_t step = n == N ? tile.depth : N;
    Vec<T> u[Samples], total[Samples];
    for (int m = 0; m < Samples; ++m) {
        if (OfWeight) u[m] = load<T>(tile.u + m * tile.lanes);
        total[m] = Vec<T>{};
    }
    for (int64_t begin = tile.begin; begin < tile.end; begin += rows) {
        const int64_t end = smaller(tile.end, begin + rows);
        Vec<T> grad_u[Samples][turns];
        for (int m = 0; m < Samples; ++m) {
            for (int turn = 0; turn < turns; ++turn) grad_u[m][turn] = Vec<T>{};
        }
        for (int64_t r = begin; r < end; r += N) {
            for_registers<n>([&](auto q) {
                const int64_t at = r * tile.depth + q * step;
                Vec<T> sum{};
                if (OfWeight && tile.first)
                    fetch_to_write(tile.grad_weight + at + fetched_ahead / int64_t(sizeof(T)));
                if (OfWeight && !tile.first) sum = load<T>(tile.grad_weight + at);
                for (int m = 0; m < Samples; ++m) {
                    const T* grad = tile.grad[m] + r;
                    const Vec<T> spread = n == N ? Vec<T>{} + grad[q] : spread_rows<N, n, q>(load<T>(grad));
                    if (OfU) grad_u[m][q % turns] += spread * load<T>(tile.weight + at);
                    if (OfWeight) sum += spread * u[m];
                }
                if (OfWeight) store<T>(tile.grad_weight + at, sum);
            });
        }
        for (int m = 0; m < Samples; ++m) {
            for (int turn = 0; turn < turns; ++turn) total[m] += grad_u[m][turn];
        }
    }
    for (int m = 0; m < Samples && OfU; ++m) store<T>(tile.grad_u + m * tile.lanes, total[m]);
}

template <typename T, int n, int Samples>
CAPSOPS_INLINE void gradients(const Tile<T>& tile, bool of_u, bool of_weight) {
    if (of_u && of_weight) {
        gradients<T, n, Samples, true, true>(tile);
    } else if (of_u) {
        gradients<T, n, Samples, true, false>(tile);
    } else {
        gradients<T, n, Samples, false, true>(tile);
    }
}

template <typename T, int n>
CAPSOPS_INLINE void gradients(const Tile<T>& tile, int64_t samples, bool of_u, bool of_weight) {
    static_assert(samples_at_a_time == 4, "a case for each number of samples");
    switch (samples) {
        case 1:
            return gradients<T, n, 1>(tile, of_u, of_weight);
        case 2:
            return gradients<T, n, 2>(tile, of_u, of_weight);
        case 3:
            return gradients<T, n, 3>(tile, of_u, of_weight);
        default:
            return gradients<T, n, 4>(tile, of_u, of_weight);
    }
}

// W_i as [padded, depth], with zeros where the tensor has no numbers.
template <typename T>
const T* padded_weight(const PredictionsCall& call, int64_t i, const BackwardScratch<T>& scratch, T* copy) {
    const int64_t R = call.J * call.D, K = call.K, depth = scratch.depth;
    if (depth == K) return weight_rows(call, i, scratch.padded, copy);
    std::memset(copy, 0, scratch.size() * sizeof(T));
    for (int64_t r = 0; r < R; ++r) read_row(call.weight, call.dtype, (i * R + r) * K, K, copy + r * depth);
    return copy;
}

// A block of input capsules of which a thread computes the gradients.
template <typename T>
class GradientBlock {
    const PredictionsCall& call_;
    const BackwardScratch<T>& scratch_;
    const int64_t first_, count_, R_;
    const bool of_u_, of_weight_, native_, in_place_;
    const T* weight_[most_capsules];
    T* grad_weight_[most_capsules];

  public:
    GradientBlock(const PredictionsCall& call, const BackwardScratch<T>& scratch, int64_t first,
                  int64_t count, bool of_u, bool of_weight)
        : call_(call),
          scratch_(scratch),
          first_(first),
          count_(count),
          R_(call.J * call.D),
          of_u_(of_u),
          of_weight_(of_weight),
          native_(is_native<T>(call.dtype)),
          in_place_(native_ && scratch.padded == R_ && scratch.depth == call.K) {
        for (int64_t n = 0; n < count; ++n) {
            const int64_t i = first + n;
            if (of_u) weight_[n] = padded_weight(call, i, scratch, scratch.weight + n * scratch.size());
            grad_weight_[n] = in_place_ && of_weight ? static_cast<T*>(call.grad_weight) + i * R_ * call.K
                                                     : scratch.grad_weight + n * scratch.size();
        }
    }

    // The samples [begin, end), and of ∂W the rows [row, row_end).
    void add(int64_t begin, int64_t end, int64_t row, int64_t row_end) {
        for (int64_t b = begin; b < end; b += samples_at_a_time) {
            for (int64_t n = 0; n < count_; ++n)
                add_samples(b, smaller(samples_at_a_time, end - b), n, row, row_end, b == begin);
        }
    }

    // Writes these rows of ∂W.
    void finish(int64_t row, int64_t row_end) {
        const int64_t K = call_.K, rows = smaller(R_, row_end) - row;
        for (int64_t n = 0; n < count_ && !in_place_; ++n) {
            const T* grad = grad_weight_[n] + row * scratch_.depth;
            const int64_t at = ((first_ + n) * R_ + row) * K;
            if (scratch_.depth == K) {
                write_row(call_.grad_weight, call_.dtype, at, rows * K, grad);
                continue;
            }
            for (int64_t r = 0; r < rows; ++r)
                write_row(call_.grad_weight, call_.dtype, at + r * K, K, grad + r * scratch_.depth);
        }
    }

  private:
    void add_samples(int64_t b, int64_t samples, int64_t n, int64_t row, int64_t row_end, bool is_first) {
        constexpr int N = vec_width<T>;
        const int64_t K = call_.K, depth = scratch_.depth, lanes = scratch_.lanes();
        Tile<T> tile{};
        for (int64_t m = 0; m < samples; ++m) {
            const int64_t capsule = (b + m) * call_.I + first_ + n;
            if (is_native<T>(call_.u_hat_dtype) && scratch_.padded == R_) {
                tile.grad[m] = static_cast<const T*>(call_.grad) + capsule * R_;
            } else {
                T* copy = scratch_.rows + m * scratch_.padded;
                read_row(call_.grad, call_.u_hat_dtype, capsule * R_, R_, copy);
                for (int64_t r = R_; r < scratch_.padded; ++r) copy[r] = 0;
                tile.grad[m] = copy;
            }
            if (!of_weight_) continue;
            T* u = scratch_.capsules + m * lanes;
            read_row(call_.u, call_.dtype, capsule * K, K, u);
            for (int64_t k = K; k < depth; ++k) u[k] = 0;
            for (int64_t k = depth; k < N; ++k) u[k] = u[k - depth];
        }
        tile.lanes = lanes;
        tile.depth = depth;
        tile.begin = row;
        tile.end = row_end;
        tile.first = is_first;
        for (int64_t at = 0; at < depth; at += N) {
            tile.u = scratch_.capsules + at;
            tile.weight = of_u_ ? weight_[n] + at : nullptr;
            tile.grad_weight = grad_weight_[n] + at;
            tile.grad_u = scratch_.grad_u + at;
            const bool is_short = with_short_rows<N>(
                depth, [&](auto rows) { gradients<T, rows>(tile, samples, of_u_, of_weight_); });
            if (!is_short) gradients<T, N>(tile, samples, of_u_, of_weight_);
        }
        for (int64_t m = 0; m < samples && of_u_; ++m) {
            T* grad_u = scratch_.grad_u + m * lanes;
            for (int64_t at = depth; at < N; ++at) grad_u[at % depth] += grad_u[at];
            write_row(call_.grad_u, call_.dtype, ((b + m) * call_.I + first_ + n) * K, K, grad_u);
        }
    }
};

// This thread's share of both gradients. Where there are many input capsules, a thread reads ∂û of its own
// once for both. Else it computes ∂u of some samples, and rows of ∂W.
template <typename T>
void gradients_of(const PredictionsCall& call, const Team& team, const BackwardScratch<T>& scratch) {
    constexpr int N = vec_width<T>;
    const int64_t padded = scratch.padded;
    if (team.size == 1 || call.I >= 4 * team.size) {
        const int64_t end = team.end(call.I);
        const int64_t together = capsules_at_a_time<T>(call);
        for (int64_t i = team.begin(call.I); i < end; i += together) {
            GradientBlock<T> block(call, scratch, i, smaller(together, end - i), call.grad_u,
                                   call.grad_weight);
            block.add(0, call.B, 0, padded);
            if (call.grad_weight) block.finish(0, padded);
        }
        return;
    }
    for (int64_t i = 0; i < call.I; ++i) {
        const int64_t begin = team.begin(call.B), end = team.end(call.B);
        if (call.grad_u && begin < end)
            GradientBlock<T>(call, scratch, i, 1, true, false).add(begin, end, 0, padded);
        const int64_t row = team.begin(padded / N) * N, row_end = team.end(padded / N) * N;
        if (call.grad_weight && row < row_end) {
            GradientBlock<T> block(call, scratch, i, 1, false, true);
            block.add(0, call.B, row, row_end);
            block.finish(row, row_end);
        }
    }
}

template <typename Scratch, typename Work>
bool with_scratch(const PredictionsCall& call, int max_threads, const Work& work) {
    const int threads = call.B * call.I * call.J * call.D * call.K < 65536 ? 1 : max_threads;
    Arena scratch_size;
    Scratch::plan(scratch_size, call);
    Buffer buffer(scratch_size.used() * threads);
    if (!buffer.base) return false;
    run_team(threads, [&](const Team& team) {
        Arena own(buffer.base + scratch_size.used() * team.rank);
        work(team, Scratch::plan(own, call));
    });
    return true;
}

template <typename T>
bool forward(const PredictionsCall& call, int threads) {
    typedef ForwardScratch<T> Scratch;
    return with_scratch<Scratch>(call, threads, [&](const Team& team, const Scratch& scratch) {
        const bool in_place = call.B <= few_samples && with_short_rows<vec_width<T>>(call.K, [&](auto n) {
                                  predict_in_place<T, n>(call, team, scratch);
                              });
        if (!in_place) predict_transposed(call, team, scratch);
    });
}

template <typename T>
bool backward(const PredictionsCall& call, int threads) {
    if (!call.grad_u && !call.grad_weight) return true;
    typedef BackwardScratch<T> Scratch;
    return with_scratch<Scratch>(
        call, threads, [&](const Team& team, const Scratch& scratch) { gradients_of(call, team, scratch); });
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
