// Passes where all input capsules share a weight, or where predictions are the same for all output capsules:
// with the input capsules of one sample in the lanes of SIMD registers.
//
// û_ij = W_j u_i, so û_ij · x_j = u_i · (W_jᵀ x_j), and Σ_i c_ij û_ij = W_j (Σ_i c_ij u_i). A pass therefore
// needs nothing but u, J vectors of K numbers on either side, and the couplings of a chunk of input capsules:
// three products of small matrices, in tiles of registers. For predictions that are alike, W_j is 1 and K is
// D.
//
// A task is a part of the input capsules of one sample.
#pragma once

#include "dtype_convert.h"
#include "input_lanes.h"
#include "threading.h"
#include "transpose.h"

namespace capsops {
namespace CAPSOPS_ISA {

template <typename T>
class SharedSimdEngine {
    static constexpr int N = vec_width<T>;
    // A tile of a product: rows × registers.
    static constexpr int tile_rows = 4, tile_registers = register_bytes == 64 ? 4 : 2;

    const RoutingCall& call_;
    const int64_t B_, I_, J_, D_, K_;
    const int64_t slots_;
    int64_t width_;  // input capsules of a chunk, in whole registers
    T* projected_;   // Wᵀ x of the states x [slots, B, J, K]
    T* states_;      // x [slots, B, J, D], where ∂W is needed

    struct Scratch {
        T* rows;      // u of a chunk as it is in memory [width, K], then ∂u
        T* u;         // with input capsules in lanes [K, width]
        T* dots;      // logits, then couplings [slots, J, width]
        T* grad_u;    // [K, width]
        Vec<T>* sum;  // Σ_i c u over the input capsules in each lane [slots, J, K]
        T* folded;    // over all lanes [J, K]
        T* total_u;   // Σ_i u [K]
        InputLanes<T, N> lanes;

        Scratch(Arena& arena, const SharedSimdEngine& engine, bool gradient)
            : lanes(engine.call_, engine.width_, arena) {
            const int64_t J = engine.J_, K = engine.K_, width = engine.width_, slots = engine.slots_;
            rows = arena.take<T>(width * K);
            u = arena.take<T>(width * K);
            dots = arena.take<T>(larger(slots, 2) * J * width);
            grad_u = arena.take<T>(gradient ? K * width : 0);
            sum = arena.take<Vec<T>>((gradient ? slots : 1) * J * K);
            folded = arena.take<T>(J * K);
            total_u = arena.take<T>(K);
        }
    };

    Scratch scratch_of(const Team& team, bool gradient) const {
        Arena own(pool_ + pool_stride_ * team.rank);
        return Scratch(own, *this, gradient);
    }

    char* pool_ = nullptr;
    int64_t pool_stride_ = 0;

  public:
    // The sum over i is split into so many parts, so that every thread has work.
    int64_t splits = 1;
    static constexpr bool threads_own_inputs = false;  // in the gradient pass
    const LogitsGradient<T>* grad_logits = nullptr;    // null where it is not needed
    int64_t first_sample = 0;                          // number of the first sample in the whole call
    int first_rank = 0;                                // likewise of the thread
    const T* weight = nullptr;                         // [J, D, K]; null where W_j is 1
    T* grad_weight = nullptr;  // sums of each thread [threads, J, D, K]; null if not needed

    SharedSimdEngine(const RoutingCall& call, int64_t slots, int threads)
        : call_(call),
          B_(call.B),
          I_(call.I),
          J_(call.J),
          D_(call.D),
          K_(call.weight ? call.K : call.D),
          slots_(slots),
          projected_(nullptr),
          states_(nullptr) {
        // u of a chunk and its couplings stay in the first-level cache.
        const int64_t registers =
            larger(tile_registers, smaller(8, 20480 / ((K_ + J_) * int64_t(sizeof(Vec<T>)))));
        width_ = N * smaller(registers, divide_up(I_, N));
        splits = smaller(divide_up(I_, N), divide_up(threads, B_));
    }

    void plan(Arena& arena, int threads, bool backward) {
        projected_ = arena.take<T>(slots_ * B_ * J_ * K_);
        states_ = arena.take<T>(call_.grad_weight ? slots_ * B_ * J_ * D_ : 0);
        Arena scratch;
        Scratch(scratch, *this, backward);
        pool_stride_ = scratch.used();
        pool_ = arena.take<char>(pool_stride_ * threads);
    }

    // Projects a state [B, J, D] (V or ∂s of a pass) to the space of the input capsules, in a slot.
    void prepare(const Team& team, int64_t slot, const T* state) {
        for (int64_t n = team.begin(B_ * J_); n < team.end(B_ * J_); ++n) {
            const T* x = state + n * D_;
            T* to = projected_ + (slot * B_ * J_ + n) * K_;
            if (call_.grad_weight) std::memcpy(states_ + (slot * B_ * J_ + n) * D_, x, D_ * sizeof(T));
            if (!weight) {
                std::memcpy(to, x, K_ * sizeof(T));
                continue;
            }
            const T* w = weight + n % J_ * D_ * K_;
            for (int64_t k = 0; k < K_; ++k) to[k] = 0;
            for (int64_t d = 0; d < D_; ++d) {
                for (int64_t k = 0; k < K_; ++k) to[k] += x[d] * w[d * K_ + k];
            }
        }
    }

    // partial [splits, B, J, D] = Σ_i û
    CAPSOPS_NOINLINE void sum_uniform(const Team& team, int64_t, T* partial) {
        const Scratch s = scratch_of(team, false);
        for_tasks(team, [&](int64_t task, int64_t b, int64_t begin, int64_t end) {
            sum_of_inputs(s, b, begin, end);
            for (int64_t j = 0; j < J_; ++j) std::memcpy(s.folded + j * K_, s.total_u, K_ * sizeof(T));
            write_partial(s, partial, task);
        });
    }

    // partial = Σ_i c û with the couplings of the state in slot `v`
    CAPSOPS_NOINLINE void sum_routed(const Team& team, int64_t, int64_t v, T* partial) {
        sum_scaled(team, partial, [&](const Scratch& s, int64_t b, int64_t i0, int64_t count) {
            products(projected(v, b), s.u, s.dots);
            s.lanes.couple(b, i0, count, 1, s.dots);
            return s.dots;
        });
    }

    // partial = Σ_i ∂b û with V in slot `v` and ∂s in slot `ds`
    CAPSOPS_NOINLINE void sum_agreement(const Team& team, int64_t, int64_t v, int64_t ds, T* partial) {
        sum_scaled(team, partial, [&](const Scratch& s, int64_t b, int64_t i0, int64_t count) {
            T* grad_b = s.dots + J_ * width_;
            products(projected(v, b), s.u, s.dots);
            products(projected(ds, b), s.u, grad_b);
            s.lanes.couple(b, i0, count, 1, s.dots);
            s.lanes.softmax_vjp(s.dots, grad_b);
            return grad_b;
        });
    }

    // Computes ∂u and adds to ∂W. The slots are V of `terms` passes, then their ∂s, then, with `uniform`, the
    // scaled ∂s of the first pass. `agreement`: whether the gradient flows through the logits too.
    CAPSOPS_NOINLINE void gradient(const Team& team, int64_t terms, bool uniform, bool agreement) {
        const Scratch s = scratch_of(team, true);
        const bool needs_b = agreement || grad_logits;
        const int64_t block = J_ * width_, factors = agreement ? 2 * terms : terms;  // of ∂û
        for_tasks(team, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
            if (grad_weight) std::memset(s.sum, 0, factors * J_ * K_ * sizeof(Vec<T>));
            for_chunks(s, b, begin, end, [&](int64_t i0, int64_t count) {
                for (int64_t t = 0; t < (needs_b ? 2 : 1) * terms; ++t)
                    products(projected(t, b), s.u, s.dots + t * block);
                s.lanes.couple(b, i0, count, terms, s.dots);
                for (int64_t t = 0; needs_b && t < terms; ++t)
                    s.lanes.softmax_vjp(s.dots + t * block, s.dots + (terms + t) * block);
                if (grad_logits) {
                    s.lanes.add_gradient(*grad_logits, first_rank + team.rank, first_sample + b, i0, count,
                                         terms, s.dots + terms * block);
                }
                // dots of slot t < terms are c, the factors of ∂s in slot terms + t; those of slot terms + t
                // are ∂b, the factors of V in slot t.
                if (grad_weight) {
                    for (int64_t t = 0; t < factors; ++t)
                        add_sums(s.dots + t * block, s.u, s.sum + t * J_ * K_);
                }
                if (call_.grad_u) {
                    uniform_gradient_of_u(s, b, terms, uniform);
                    for (int64_t t = 0; t < factors; ++t) {
                        const int64_t slot = t < terms ? terms + t : t - terms;
                        add_gradient_of_u(projected(slot, b), s.dots + t * block, s.grad_u);
                    }
                    write_grad_u(s, b, i0, count);
                }
            });
            if (!grad_weight) return;
            T* total = grad_weight + (first_rank + team.rank) * J_ * D_ * K_;
            for (int64_t t = 0; t < factors; ++t) {
                fold(s.sum + t * J_ * K_, s.folded);
                add_gradient_of_weight(state(t < terms ? terms + t : t - terms, b), s.folded, K_, total);
            }
            if (uniform) {
                sum_of_inputs(s, b, begin, end);
                add_gradient_of_weight(state(2 * terms, b), s.total_u, 0, total);
            }
        });
    }

    // Writes the couplings of the state in slot `v` to call.couplings.
    CAPSOPS_NOINLINE void couplings(const Team& team, int64_t v) {
        const Scratch s = scratch_of(team, false);
        for_tasks(team, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
            for_chunks(s, b, begin, end, [&](int64_t i0, int64_t count) {
                products(projected(v, b), s.u, s.dots);
                s.lanes.couple(b, i0, count, 1, s.dots);
                s.lanes.write(b, i0, count, s.dots);
            });
        });
    }

  private:
    const T* projected(int64_t slot, int64_t b) const { return projected_ + (slot * B_ + b) * J_ * K_; }
    const T* state(int64_t slot, int64_t b) const { return states_ + (slot * B_ + b) * J_ * D_; }

    // Calls work(task, sample, first and last input capsule) for this thread's share of all pairs (split,
    // sample).
    template <typename Work>
    void for_tasks(const Team& team, const Work& work) const {
        for (int64_t task = team.begin(splits * B_); task < team.end(splits * B_); ++task) {
            const int64_t split = task / B_;
            work(task, task % B_, I_ * split / splits, I_ * (split + 1) / splits);
        }
    }

    // Calls work(first input capsule, number of input capsules) for each chunk of some of them. u of the
    // chunk is in scratch.u; lanes without an input capsule are 0, and so are those of absent ones.
    template <typename Work>
    void for_chunks(const Scratch& s, int64_t b, int64_t begin, int64_t end, const Work& work) const {
        for (int64_t i0 = begin; i0 < end; i0 += width_) {
            const int64_t count = smaller(width_, end - i0);
            transpose_block(rows_of(s, b, i0, count), K_, count, K_, s.u, width_);
            for (int64_t k = 0; count < width_ && k < K_; ++k)
                std::memset(s.u + k * width_ + count, 0, (width_ - count) * sizeof(T));
            work(i0, count);
        }
    }

    // u of some input capsules [count, K], 0 for absent ones.
    const T* rows_of(const Scratch& s, int64_t b, int64_t i0, int64_t count) const {
        const int64_t at = (b * I_ + i0) * K_;
        if (is_native<T>(call_.dtype) && !call_.mask) return static_cast<const T*>(call_.u) + at;
        read_row(call_.u, call_.dtype, at, count * K_, s.rows);
        clear_absent(call_, b, i0, count, K_, s.rows);
        return s.rows;
    }

    // scratch.total_u = Σ_i u
    void sum_of_inputs(const Scratch& s, int64_t b, int64_t begin, int64_t end) const {
        std::memset(s.total_u, 0, K_ * sizeof(T));
        for (int64_t i0 = begin; i0 < end; i0 += width_) {
            const int64_t count = smaller(width_, end - i0);
            const T* rows = rows_of(s, b, i0, count);
            T* part = s.folded;  // of one chunk, which keeps rounding errors small
            std::memset(part, 0, K_ * sizeof(T));
            for (int64_t n = 0; n < count; ++n) {
                for (int64_t k = 0; k < K_; ++k) part[k] += rows[n * K_ + k];
            }
            for (int64_t k = 0; k < K_; ++k) s.total_u[k] += part[k];
        }
    }

    // partial = Σ_i c û with c [J, width] = coefficients(scratch, sample, first input capsule, their number).
    template <typename Coefficients>
    void sum_scaled(const Team& team, T* partial, const Coefficients& coefficients) {
        const Scratch s = scratch_of(team, false);
        for_tasks(team, [&](int64_t task, int64_t b, int64_t begin, int64_t end) {
            std::memset(s.sum, 0, J_ * K_ * sizeof(Vec<T>));
            for_chunks(s, b, begin, end, [&](int64_t i0, int64_t count) {
                add_sums(coefficients(s, b, i0, count), s.u, s.sum);
            });
            fold(s.sum, s.folded);
            write_partial(s, partial, task);
        });
    }

    // partial of a task [J, D] = W_j times scratch.folded [J, K]
    void write_partial(const Scratch& s, T* partial, int64_t task) const {
        T* out = partial + task * J_ * D_;
        if (!weight) {
            std::memcpy(out, s.folded, J_ * D_ * sizeof(T));
            return;
        }
        for (int64_t r = 0; r < J_ * D_; ++r) {
            const T *w = weight + r * K_, *x = s.folded + r / D_ * K_;
            T total = 0;
#pragma omp simd reduction(+ : total)
            for (int64_t k = 0; k < K_; ++k) total += w[k] * x[k];
            out[r] = total;
        }
    }

    // ∂W_j += x_j z_jᵀ for x [J, D] and z, whose rows of K numbers are `stride` apart.
    void add_gradient_of_weight(const T* x, const T* z, int64_t stride, T* total) const {
        for (int64_t r = 0; r < J_ * D_; ++r) {
            const T* z_j = z + r / D_ * stride;
            for (int64_t k = 0; k < K_; ++k) total[r * K_ + k] += x[r] * z_j[k];
        }
    }

    // Sums over the lanes.
    void fold(const Vec<T>* sums, T* out) const {
        int64_t p = 0;
        for (; p + N <= J_ * K_; p += N) {
            Vec<T> some[N];
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) some[n] = sums[p + n];
            store<T>(out + p, sum_lanes<N>(some));
        }
        for (; p < J_ * K_; ++p) out[p] = sum<T>(sums[p]);
    }

    // scratch.grad_u [K, width] = Σ_j Wᵀ ∂s of the first pass, the same for all input capsules, or 0.
    void uniform_gradient_of_u(const Scratch& s, int64_t b, int64_t terms, bool uniform) const {
        for (int64_t k = 0; k < K_; ++k) {
            T total = 0;
            for (int64_t j = 0; uniform && j < J_; ++j) total += projected(2 * terms, b)[j * K_ + k];
            for (int64_t n = 0; n < width_; ++n) s.grad_u[k * width_ + n] = total;
        }
    }

    void write_grad_u(const Scratch& s, int64_t b, int64_t i0, int64_t count) const {
        transpose_block(s.grad_u, width_, K_, count, s.rows, K_);
        clear_absent(call_, b, i0, count, K_, s.rows);
        write_row(call_.grad_u, call_.dtype, (b * I_ + i0) * K_, count * K_, s.rows);
    }

    // Calls work(first of n rows, their number as a constant) in tiles.
    template <int Tile, typename Work>
    static CAPSOPS_INLINE void for_tiles(int64_t n, const Work& work) {
        int64_t at = 0;
        for (; at + Tile <= n; at += Tile) work(at, std::integral_constant<int, Tile>{});
        for (; at < n; ++at) work(at, std::integral_constant<int, 1>{});
    }

    // dots [J, width] = x u for x [J, K] and u [K, width]
    CAPSOPS_NOINLINE void products(const T* x, const T* u, T* dots) const {
        for_tiles<tile_registers>(width_ / N, [=](int64_t at, auto registers) CAPSOPS_ALWAYS {
            for_tiles<tile_rows>(J_, [=](int64_t j, auto rows) CAPSOPS_ALWAYS {
                product_tile<decltype(rows)::value, decltype(registers)::value, false>(
                    x + j * K_, K_, 1, K_, u + at * N, dots + j * width_ + at * N);
            });
        });
    }

    // grad_u [K, width] += xᵀ c for x [J, K] and c [J, width]
    CAPSOPS_NOINLINE void add_gradient_of_u(const T* x, const T* c, T* grad_u) const {
        for_tiles<tile_registers>(width_ / N, [=](int64_t at, auto registers) CAPSOPS_ALWAYS {
            for_tiles<tile_rows>(K_, [=](int64_t k, auto rows) CAPSOPS_ALWAYS {
                product_tile<decltype(rows)::value, decltype(registers)::value, true>(
                    x + k, 1, K_, J_, c + at * N, grad_u + k * width_ + at * N);
            });
        });
    }

    // out = a x, or with Add out += a x, for a tile of Rows rows. Rows and columns of a are `row` and
    // `column` apart, rows of x and out a width; `depth` is the number of a's columns.
    template <int Rows, int Registers, bool Add>
    CAPSOPS_INLINE void product_tile(const T* a, int64_t row, int64_t column, int64_t depth, const T* x,
                                     T* out) const {
        Vec<T> total[Rows][Registers];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < Registers; ++n)
                total[r][n] = Add ? load<T>(out + r * width_ + n * N) : Vec<T>{};
        }
        for (int64_t p = 0; p < depth; ++p) {
            Vec<T> x_p[Registers];
#pragma GCC unroll 4
            for (int n = 0; n < Registers; ++n) x_p[n] = load<T>(x + p * width_ + n * N);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
                const T a_r = a[r * row + p * column];
#pragma GCC unroll 4
                for (int n = 0; n < Registers; ++n) total[r][n] += a_r * x_p[n];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < Registers; ++n) store<T>(out + r * width_ + n * N, total[r][n]);
        }
    }

    // sums [J, K] += c uᵀ, over the registers of c [J, width] and u [K, width]
    CAPSOPS_NOINLINE void add_sums(const T* c, const T* u, Vec<T>* sums) const {
        for_tiles<tile_rows>(J_, [=](int64_t j, auto rows) CAPSOPS_ALWAYS {
            for_tiles<tile_registers>(K_, [=](int64_t k, auto columns) CAPSOPS_ALWAYS {
                sums_tile<decltype(rows)::value, decltype(columns)::value>(c + j * width_, u + k * width_,
                                                                           sums + j * K_ + k);
            });
        });
    }

    template <int Rows, int Columns>
    CAPSOPS_INLINE void sums_tile(const T* c, const T* u, Vec<T>* sums) const {
        Vec<T> total[Rows][Columns];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < Columns; ++n) total[r][n] = Vec<T>{};
        }
        for (int64_t at = 0; at < width_; at += N) {
            Vec<T> u_n[Columns];
#pragma GCC unroll 4
            for (int n = 0; n < Columns; ++n) u_n[n] = load<T>(u + n * width_ + at);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) {
                const Vec<T> c_r = load<T>(c + r * width_ + at);
#pragma GCC unroll 4
                for (int n = 0; n < Columns; ++n) total[r][n] += c_r * u_n[n];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < Columns; ++n) sums[r * K_ + n] += total[r][n];
        }
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
