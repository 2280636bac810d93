// Passes over u and weight with the samples of the batch in the lanes of SIMD registers.
//
// A lane group is 16 (or 8) samples. û of one pair (i, j) is then D registers, its product with V needs no
// sums over lanes, and the softmax over j is element-wise. û of one i, J·D registers, stays in the
// first-level cache between the logits and the sum. Several lane groups process a chunk of input capsules in
// turn, so that its W is read from memory once for all of them. Every other pass goes through the input
// capsules backwards, so that it begins with what the previous pass left in the cache.
//
// In the gradient pass each thread has a range of i and computes all of ∂W_i and ∂u_i for it, so no sums
// between threads are needed.
#pragma once

#include "dtype_convert.h"
#include "sample_lanes.h"
#include "threading.h"
#include "transpose.h"

namespace capsops {
namespace CAPSOPS_ISA {

template <typename T>
class BatchSimdEngine {
    static constexpr int L = lane_group<T>;
    // Long sums are made of partial sums of at most so many products, which reduces rounding errors.
    static constexpr int longest_sum = 32, longest_uniform_sum = 64;

    const RoutingCall& call_;
    const int64_t B_, I_, J_, D_, K_, R_;  // R = J·D
    const int64_t groups_;                 // lane groups
    const int64_t padded_;                 // R in whole registers
    int64_t chunk_;                        // input capsules that are processed together
    int64_t block_;                        // lane groups that share a chunk of W
    const int64_t slots_;
    T* states_;  // [slots, groups, R, L]

    struct Scratch {
        T* u_rows;         // u of a chunk, a row for each sample [L, chunk·K]
        Lanes<T>* u;       // [chunk·K]
        T* weight;         // of a chunk [chunk, R, K], if it has to be converted
        Lanes<T>* u_hat;   // of one i [R]; in the gradient then ∂û
        Lanes<T>* dots;    // [slots, J]
        Lanes<T>* sum;     // [block, R]
        Lanes<T>* part;    // the sum over one chunk [R]
        Lanes<T>* grad_u;  // [chunk·K]
        T* transposed;     // ∂û of one i [L, padded]
        T* grad_weight;    // of a chunk [chunk, K, padded]
        T* weight_rows;    // ∂W of one i [R, K]
        SampleLanes<T> lanes;

        Scratch(Arena& arena, const RoutingCall& call) : lanes(call, arena) {}

        static Scratch plan(Arena& arena, const BatchSimdEngine& engine, bool gradient) {
            const int64_t R = engine.R_, K = engine.K_, chunk = engine.chunk_;
            const bool converts = !is_native<T>(engine.call_.dtype);
            Scratch scratch(arena, engine.call_);
            scratch.u_rows = arena.take<T>(L * chunk * K);
            scratch.u = arena.take<Lanes<T>>(chunk * K);
            scratch.weight = arena.take<T>(converts ? chunk * R * K : 0);
            scratch.u_hat = arena.take<Lanes<T>>(R);
            scratch.dots = arena.take<Lanes<T>>(larger(engine.slots_, 4) * engine.J_);
            scratch.sum = arena.take<Lanes<T>>(gradient ? 0 : engine.block_ * R);
            scratch.part = arena.take<Lanes<T>>(gradient ? 0 : R);
            scratch.grad_u = arena.take<Lanes<T>>(gradient ? chunk * K : 0);
            scratch.transposed = arena.take<T>(gradient ? L * engine.padded_ : 0);
            scratch.grad_weight = arena.take<T>(gradient ? chunk * K * engine.padded_ : 0);
            scratch.weight_rows = arena.take<T>(gradient ? R * K : 0);
            return scratch;
        }
    };

    Scratch scratch_of(const Team& team, bool gradient) const {
        Arena own(pool_ + pool_stride_ * team.rank);
        return Scratch::plan(own, *this, gradient);
    }

    char* pool_ = nullptr;
    int64_t pool_stride_ = 0;
    void (BatchSimdEngine::*predict_)(const T*, const Lanes<T>*, const Lanes<T>*, int64_t, int64_t, Lanes<T>*,
                                      Lanes<T>*, const Lanes<T>*, Lanes<T>*) const;
    void (BatchSimdEngine::*add_uniform_)(const T*, int64_t, const Lanes<T>*, Lanes<T>*) const;

  public:
    // The sum over i is split into so many parts, so that every thread has work.
    int64_t splits = 1;
    static constexpr bool threads_own_inputs = true;  // in the gradient pass
    const LogitsGradient<T>* grad_logits = nullptr;   // null where it is not needed

    // With fewer samples too many lanes are empty (measured, see benchmarks/results/NOTES.md).
    static bool supports(const RoutingCall& call) {
        return call.weight && !call.shared && call.B > larger(1, L / 5);
    }

    // `slots`: how many states are stored at a time.
    BatchSimdEngine(const RoutingCall& call, int64_t slots, int threads)
        : call_(call),
          B_(call.B),
          I_(call.I),
          J_(call.J),
          D_(call.D),
          K_(call.K),
          R_(J_ * D_),
          groups_(divide_up(B_, L)),
          padded_(round_up(R_, vec_width<T>)),
          slots_(slots),
          states_(nullptr) {
        // A split costs B·J·D numbers, but a thread whose share is a split reads only its part of W. More
        // splits where threads would be idle for long.
        splits = larger(1, smaller(smaller(threads, I_), I_ * K_ / (16 * B_)));
        while (splits < smaller(threads, I_) && !balanced(splits * groups_, threads)) ++splits;
        chunk_ = larger(1, smaller(16, 98304 / (R_ * K_ * int64_t(sizeof(T)))));
        choose_kernels();
        block_ = larger(1, smaller(smaller(8, groups_), 262144 / (R_ * int64_t(sizeof(Lanes<T>)))));
    }

    void plan(Arena& arena, int threads, bool backward) {
        states_ = arena.take<T>(slots_ * groups_ * R_ * L);
        Arena sum, gradient;
        Scratch::plan(sum, *this, false);
        if (backward) Scratch::plan(gradient, *this, true);
        pool_stride_ = larger(sum.used(), gradient.used());
        pool_ = arena.take<char>(pool_stride_ * threads);
    }

    // Copies a state [B, J, D] (V or ∂s of a pass) to a slot.
    void prepare(const Team& team, int64_t slot, const T* state) {
        for (int64_t g = team.begin(groups_); g < team.end(groups_); ++g) {
            T* lanes = states_ + (slot * groups_ + g) * R_ * L;
            const int64_t samples = smaller(L, B_ - g * L);
            if (samples < L) std::memset(lanes, 0, R_ * L * sizeof(T));
            transpose_block(state + g * L * R_, R_, samples, R_, lanes, L);
        }
    }

    // partial [splits, B, J, D] = Σ_i û; every other pass goes through i backwards
    CAPSOPS_NOINLINE void sum_uniform(const Team& team, int64_t pass, T* partial) {
        const int64_t few = larger(1, longest_uniform_sum / K_);
        sum_over_i(team, pass, partial,
                   [&](const Scratch& s, const T* w, int64_t, int64_t count, int64_t, Lanes<T>* sum) {
                       for (int64_t n = 0; n < count; n += few) {
                           (this->*add_uniform_)(w + n * R_ * K_, smaller(few, count - n), s.u + n * K_, sum);
                       }
                   });
    }

    // partial = Σ_i c û with the couplings of the state in slot `v`
    CAPSOPS_NOINLINE void sum_routed(const Team& team, int64_t pass, int64_t v, T* partial) {
        sum_over_i(team, pass, partial,
                   [&](const Scratch& s, const T* w, int64_t i0, int64_t count, int64_t g, Lanes<T>* sum) {
                       sum_scaled(s, w, count, state(v, g), 0, 1, sum, [&](Lanes<T>* dots, int64_t n) {
                           s.lanes.couple(g * L, i0 + n, dots, 1, 1);
                           return dots;
                       });
                   });
    }

    // partial = Σ_i ∂b û with V in slot `v` and ∂s in slot `ds`
    CAPSOPS_NOINLINE void sum_agreement(const Team& team, int64_t pass, int64_t v, int64_t ds, T* partial) {
        const int64_t stride = (ds - v) * groups_ * R_;
        sum_over_i(team, pass, partial,
                   [&](const Scratch& s, const T* w, int64_t i0, int64_t count, int64_t g, Lanes<T>* sum) {
                       sum_scaled(s, w, count, state(v, g), stride, 2, sum, [&](Lanes<T>* dots, int64_t n) {
                           s.lanes.couple(g * L, i0 + n, dots, 1, 2);
                           softmax_vjp(dots, dots + 1, J_, 2);
                           return dots + 1;
                       });
                   });
    }

    // Computes ∂u and ∂W. The slots are V of `terms` passes, then their ∂s, then, with `uniform`, the scaled
    // ∂s of the first pass. `agreement`: whether the gradient flows through the logits too.
    CAPSOPS_NOINLINE void gradient(const Team& team, int64_t terms, bool uniform, bool agreement) {
        const int64_t K = K_;
        const Scratch s = scratch_of(team, true);
        std::memset(s.transposed, 0, L * padded_ * sizeof(T));
        for (int64_t i0 = team.begin(I_); i0 < team.end(I_); i0 += chunk_) {
            const int64_t count = smaller(chunk_, team.end(I_) - i0);
            const T* w = weight_of(s, i0, count);
            std::memset(s.grad_weight, 0, count * K * padded_ * sizeof(T));
            for (int64_t g = 0; g < groups_; ++g) {
                const int64_t samples = smaller(L, B_ - g * L);
                read_u_by_rows(s, g, i0, count);
                for (int64_t n = 0; n < count; ++n) {
                    const T* w_i = w + n * R_ * K;
                    gradient_of_u_hat(s, w_i, s.u + n * K, g, i0 + n, terms, uniform, agreement);
                    if (grad_logits)
                        s.lanes.add_gradient(*grad_logits, team.rank, g * L, 0, i0 + n, terms, s.dots);
                    if (call_.grad_u) gradient_of_u(w_i, s.u_hat, s.grad_u + n * K);
                    if (call_.grad_weight) {
                        transpose_block(reinterpret_cast<const T*>(s.u_hat), L, R_, L, s.transposed, padded_);
                        gradient_of_weight(s.u_rows + n * K, count * K, samples, s.transposed,
                                           s.grad_weight + n * K * padded_);
                    }
                }
                if (call_.grad_u) write_grad_u(s, g, i0, count, samples);
            }
            for (int64_t n = 0; call_.grad_weight && n < count; ++n) {
                transpose_block(s.grad_weight + n * K * padded_, padded_, K, R_, s.weight_rows, K);
                write_row(call_.grad_weight, call_.dtype, (i0 + n) * R_ * K, R_ * K, s.weight_rows);
            }
        }
    }

    // Writes the couplings of the state in slot `v` to call.couplings.
    CAPSOPS_NOINLINE void couplings(const Team& team, int64_t v) {
        const Scratch s = scratch_of(team, false);
        T* rows = reinterpret_cast<T*>(s.u_hat);  // [L, J]
        for_chunks(team, s, [&](const T* w, int64_t i0, int64_t count, int64_t g) {
            for (int64_t n = 0; n < count; ++n) {
                (this->*predict_)(w + n * R_ * K_, s.u + n * K_, state(v, g), 0, 1, s.u_hat, s.dots, nullptr,
                                  nullptr);
                s.lanes.couple(g * L, i0 + n, s.dots, 1, 1);
                transpose_block(reinterpret_cast<const T*>(s.dots), L, J_, L, rows, J_);
                for (int64_t b = g * L; b < smaller(B_, (g + 1) * L); ++b) {
                    if (!is_present(call_, b, i0 + n))
                        std::memset(rows + (b - g * L) * J_, 0, J_ * sizeof(T));
                    write_row(call_.couplings, call_.dtype, (b * I_ + i0 + n) * J_, J_,
                              rows + (b - g * L) * J_);
                }
            }
        });
    }

  private:
    // Whether threads that share `tasks` tasks of equal length are busy nine tenths of the time.
    static bool balanced(int64_t tasks, int64_t threads) {
        return 9 * round_up(tasks, threads) <= 10 * tasks;
    }

    const Lanes<T>* state(int64_t slot, int64_t group) const {
        return reinterpret_cast<const Lanes<T>*>(states_) + (slot * groups_ + group) * R_;
    }

    // Selects the instances of the two kernels that multiply by W_i. KC is K if that is a common size, else
    // 0.
    template <int KC>
    void choose() {
        predict_ = &BatchSimdEngine::predict<KC>;
        add_uniform_ = &BatchSimdEngine::add_uniform<KC>;
    }

    void choose_kernels() {
        choose<0>();
        if constexpr (sizeof(T) == 4) {
            if (K_ == 4) choose<4>();
            if (K_ == 8) choose<8>();
            if (K_ == 16) choose<16>();
            if (K_ == 32) choose<32>();
        }
    }

    const T* weight_of(const Scratch& scratch, int64_t i0, int64_t count) const {
        if (is_native<T>(call_.dtype)) return static_cast<const T*>(call_.weight) + i0 * R_ * K_;
        read_row(call_.weight, call_.dtype, i0 * R_ * K_, count * R_ * K_, scratch.weight);
        return scratch.weight;
    }

    // Reads u of a chunk into lanes; lanes without a sample are 0, and so are input capsules that are not
    // there.
    void read_u(const Scratch& scratch, int64_t g, int64_t i0, int64_t count) const {
        if (is_native<T>(call_.dtype) && (g + 1) * L <= B_ && !call_.mask) {
            const T* u = static_cast<const T*>(call_.u) + (g * L * I_ + i0) * K_;
            transpose_block(u, I_ * K_, L, count * K_, reinterpret_cast<T*>(scratch.u), L);
        } else {
            read_u_by_rows(scratch, g, i0, count);
        }
    }

    // The same; also leaves u in scratch.u_rows.
    void read_u_by_rows(const Scratch& scratch, int64_t g, int64_t i0, int64_t count) const {
        const int64_t numbers = count * K_;
        for (int64_t lane = 0; lane < L; ++lane) {
            T* row = scratch.u_rows + lane * numbers;
            const int64_t b = g * L + lane;
            if (b < B_) {
                read_row(call_.u, call_.dtype, (b * I_ + i0) * K_, numbers, row);
                clear_absent(call_, b, i0, count, K_, row);
            } else {
                std::memset(row, 0, numbers * sizeof(T));
            }
        }
        transpose_block(scratch.u_rows, numbers, L, numbers, reinterpret_cast<T*>(scratch.u), L);
    }

    // Calls work(scratch, W of a chunk, its first input capsule, their number, lane group, sum [R]) for this
    // thread's share of all pairs (split, lane group). Writes the sums to partial [splits, B, R].
    template <typename Work>
    void sum_over_i(const Team& team, int64_t pass, T* partial, const Work& work) {
        const Scratch scratch = scratch_of(team, false);
        const bool backwards = pass & 1;
        const int64_t tasks = splits * groups_;
        for (int64_t task = team.begin(tasks); task < team.end(tasks);) {
            const int64_t split = task / groups_, g0 = task % groups_;
            const int64_t g1 = smaller(smaller(groups_, g0 + block_), g0 + team.end(tasks) - task);
            std::memset(scratch.sum, 0, (g1 - g0) * R_ * sizeof(Lanes<T>));
            const int64_t begin = I_ * split / splits, end = I_ * (split + 1) / splits;
            const int64_t chunks = divide_up(end - begin, chunk_);
            for (int64_t n = 0; n < chunks; ++n) {
                const int64_t i0 = begin + (backwards ? chunks - 1 - n : n) * chunk_;
                const int64_t count = smaller(chunk_, end - i0);
                const T* w = weight_of(scratch, i0, count);
                for (int64_t g = g0; g < g1; ++g) {
                    read_u(scratch, g, i0, count);
                    work(scratch, w, i0, count, g, scratch.sum + (g - g0) * R_);
                }
            }
            for (int64_t g = g0; g < g1; ++g) {
                const T* sum = reinterpret_cast<const T*>(scratch.sum + (g - g0) * R_);
                transpose_block(sum, L, R_, smaller(L, B_ - g * L), partial + (split * B_ + g * L) * R_, R_);
            }
            task += g1 - g0;
        }
    }

    // Calls work(W of a chunk, its first input capsule, their number, lane group) for this thread's share of
    // i.
    template <typename Work>
    void for_chunks(const Team& team, const Scratch& scratch, const Work& work) {
        for (int64_t i0 = team.begin(I_); i0 < team.end(I_); i0 += chunk_) {
            const int64_t count = smaller(chunk_, team.end(I_) - i0);
            const T* w = weight_of(scratch, i0, count);
            for (int64_t g = 0; g < groups_; ++g) {
                read_u(scratch, g, i0, count);
                work(w, i0, count, g);
            }
        }
    }

    // û of Rows rows of W_i. interleaved(k) runs between the steps over k.
    template <int KC, int Rows, typename Interleaved>
    CAPSOPS_INLINE void predict_rows(const T* w, const Lanes<T>* u, Lanes<T> (&u_hat)[Rows],
                                     const Interleaved& interleaved) const {
        const int64_t K = KC ? KC : K_;
        const Lanes<T> u_0 = u[0];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) u_hat[r] = product(w[r * K], u_0);
        interleaved(0);
#pragma GCC unroll 8
        for (int64_t k = 1; k < K; ++k) {
            const Lanes<T> u_k = u[k];
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) add_product(u_hat[r], w[r * K + k], u_k);
            interleaved(k);
        }
    }

    // Computes Rows rows of û_ij and adds their part to the dot products with `count` states; the `first`
    // rows initialise them. With `sum`, first adds c times the old û, which is overwritten, to `sum`.
    template <int KC, int Rows>
    CAPSOPS_INLINE void predict_tile(const T* w, const Lanes<T>* u, const Lanes<T>* states, int64_t stride,
                                     int64_t count, Lanes<T>* u_hat, Lanes<T>* dots, bool first,
                                     const Lanes<T>* c, Lanes<T>* sum) const {
        constexpr int Sums = Rows < 4 ? Rows : 4;
        constexpr int RowsPerK = KC ? (Rows + KC - 1) / KC : 1;  // of the sum
        Lanes<T> tile[Rows];
        if (sum) {
            const Lanes<T> scale = *c;
            predict_rows<KC, Rows>(w, u, tile, [=](int64_t k) CAPSOPS_ALWAYS {
#pragma GCC unroll 16
                for (int n = 0; n < RowsPerK; ++n) {
                    const int64_t r = k * RowsPerK + n;
                    if (r < Rows) add_product(sum[r], scale, u_hat[r]);
                }
            });
            for (int64_t r = (KC ? KC : K_) * RowsPerK; r < Rows; ++r) add_product(sum[r], scale, u_hat[r]);
        } else {
            predict_rows<KC, Rows>(w, u, tile, [](int64_t) {});
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) u_hat[r] = tile[r];
        for (int64_t n = 0; n < count; ++n) {
            Lanes<T> total[Sums];
#pragma GCC unroll 4
            for (int r = 0; r < Sums; ++r) total[r] = tile[r] * states[n * stride + r];
#pragma GCC unroll 16
            for (int r = Sums; r < Rows; ++r) add_product(total[r % Sums], tile[r], states[n * stride + r]);
#pragma GCC unroll 4
            for (int r = 1; r < Sums; ++r) total[0] += total[r];
            dots[n] = first ? total[0] : dots[n] + total[0];
        }
    }

    // Computes û of one i [R] and dots [J, count] = û · state for `count` states that are `stride` apart.
    // With `sum` [R], first adds the old û, which is overwritten, to `sum`, scaled by c [J], whose numbers
    // are `count` apart.
    template <int KC>
    CAPSOPS_NOINLINE void predict(const T* w, const Lanes<T>* u, const Lanes<T>* states, int64_t stride,
                                  int64_t count, Lanes<T>* u_hat, Lanes<T>* dots, const Lanes<T>* c,
                                  Lanes<T>* sum) const {
        const int64_t K = KC ? KC : K_;
        for (int64_t j = 0; j < J_; ++j) {
            for_row_tiles(D_, [=](int64_t d, auto rows) CAPSOPS_ALWAYS {
                const int64_t r = j * D_ + d;
                predict_tile<KC, decltype(rows)::value>(w + r * K, u, states + r, stride, count, u_hat + r,
                                                        dots + j * count, d == 0, c ? c + j * count : nullptr,
                                                        sum ? sum + r : nullptr);
            });
        }
    }

    // sum [R] += Σ_i c_i û_i over the input capsules of a chunk, with c = coefficients(dots, its number),
    // `count` apart.
    //
    // The products c û of one i mostly load and store, and computing û of the next mostly multiplies, so the
    // two are interleaved.
    template <typename Coefficients>
    CAPSOPS_INLINE void sum_scaled(const Scratch& s, const T* w, int64_t chunk, const Lanes<T>* states,
                                   int64_t stride, int64_t count, Lanes<T>* sum,
                                   const Coefficients& coefficients) const {
        Lanes<T>*dots = s.dots, *next_dots = s.dots + count * J_;
        const Lanes<T>* c = nullptr;
        std::memset(s.part, 0, R_ * sizeof(Lanes<T>));
        for (int64_t n = 0; n < chunk; ++n) {
            (this->*predict_)(w + n * R_ * K_, s.u + n * K_, states, stride, count, s.u_hat, dots, c,
                              c ? s.part : nullptr);
            c = coefficients(dots, n);
            Lanes<T>* const previous = dots;
            dots = next_dots;
            next_dots = previous;
        }
        for (int64_t j = 0; j < J_; ++j) {
            const Lanes<T> c_j = c[j * count];
            for (int64_t r = j * D_; r < (j + 1) * D_; ++r) {
                add_product(s.part[r], c_j, s.u_hat[r]);
                sum[r] += s.part[r];
            }
        }
    }

    // Calls work(first row, number of rows) for n rows in tiles, whose sizes are compile-time constants.
    template <typename Work>
    static CAPSOPS_INLINE void for_row_tiles(int64_t n, const Work& work) {
        int64_t r = 0;
        for (; r + rows_per_tile <= n; r += rows_per_tile)
            work(r, std::integral_constant<int, rows_per_tile>{});
        if constexpr (rows_per_tile > 8) {
            if (r + 8 <= n) {
                work(r, std::integral_constant<int, 8>{});
                r += 8;
            }
        }
        if constexpr (rows_per_tile > 4) {
            if (r + 4 <= n) {
                work(r, std::integral_constant<int, 4>{});
                r += 4;
            }
        }
        for (; r < n; ++r) work(r, std::integral_constant<int, 1>{});
    }

    // sum [R] += Σ û over the input capsules of a chunk.
    template <int KC>
    CAPSOPS_NOINLINE void add_uniform(const T* w, int64_t count, const Lanes<T>* u, Lanes<T>* sum) const {
        const int64_t K = KC ? KC : K_;
        for_row_tiles(R_, [=](int64_t r, auto rows) CAPSOPS_ALWAYS {
            constexpr int Rows = decltype(rows)::value;
            Lanes<T> total[Rows];
#pragma GCC unroll 16
            for (int n = 0; n < Rows; ++n) total[n] = Lanes<T>::filled(0);
            for (int64_t i = 0; i < count; ++i) {
                const T* w_i = w + (i * R_ + r) * K;
#pragma GCC unroll 8
                for (int64_t k = 0; k < K; ++k) {
                    const Lanes<T> u_k = u[i * K + k];
#pragma GCC unroll 16
                    for (int n = 0; n < Rows; ++n) add_product(total[n], w_i[n * K + k], u_k);
                }
            }
#pragma GCC unroll 16
            for (int n = 0; n < Rows; ++n) sum[r + n] += total[n];
        });
    }

    // Writes ∂û of one i and lane group to scratch.u_hat.
    CAPSOPS_INLINE void gradient_of_u_hat(const Scratch& s, const T* w, const Lanes<T>* u, int64_t g,
                                          int64_t i, int64_t terms, bool uniform, bool agreement) const {
        const bool needs_b = agreement || grad_logits;
        const int64_t stride = groups_ * R_, count = needs_b ? 2 * terms : terms;
        if (terms > 0) {
            (this->*predict_)(w, u, state(0, g), stride, count, s.u_hat, s.dots, nullptr, nullptr);
            s.lanes.couple(g * L, i, s.dots, terms, count);
            for (int64_t t = 0; needs_b && t < terms; ++t)
                softmax_vjp(s.dots + t, s.dots + terms + t, J_, count);
        }
        const Lanes<T>* uniform_term = state(2 * terms, g);
        for (int64_t j = 0; j < J_; ++j) {
            const Lanes<T>* dots = s.dots + j * count;
            for (int64_t r = j * D_; r < (j + 1) * D_; ++r) {
                Lanes<T> total = uniform ? uniform_term[r] : Lanes<T>::filled(0);
                for (int64_t t = 0; t < terms; ++t) {
                    add_product(total, dots[t], state(terms + t, g)[r]);
                    if (agreement) add_product(total, dots[terms + t], state(t, g)[r]);
                }
                s.u_hat[r] = total;
            }
        }
    }

    // ∂u_i = Σ_r W_i[r] ∂û_i[r], for a few k at a time.
    void gradient_of_u(const T* w, const Lanes<T>* grad_u_hat, Lanes<T>* grad_u) const {
        const int64_t K = K_;
        constexpr int Tile = 8 / registers_per_lane_group;
        int64_t k = 0;
        for (; k + Tile <= K; k += Tile) gradient_of_u_tile<Tile>(w + k, K, grad_u_hat, grad_u + k);
        for (; k < K; ++k) gradient_of_u_tile<1>(w + k, K, grad_u_hat, grad_u + k);
    }

    template <int Tile>
    CAPSOPS_INLINE void gradient_of_u_tile(const T* w, int64_t K, const Lanes<T>* grad_u_hat,
                                           Lanes<T>* grad_u) const {
        for (int k = 0; k < Tile; ++k) grad_u[k] = Lanes<T>::filled(0);
        for (int64_t r0 = 0; r0 < R_; r0 += longest_sum) {
            Lanes<T> total[Tile];
            for (int k = 0; k < Tile; ++k) total[k] = Lanes<T>::filled(0);
            for (int64_t r = r0; r < smaller(R_, r0 + longest_sum); ++r) {
                const Lanes<T> g = grad_u_hat[r];
#pragma GCC unroll 8
                for (int k = 0; k < Tile; ++k) add_product(total[k], w[r * K + k], g);
            }
            for (int k = 0; k < Tile; ++k) grad_u[k] += total[k];
        }
    }

    // ∂W_i [K, padded] += Σ_b u_b ∂û_b, with ∂û [samples, padded] and u `stride` apart.
    void gradient_of_weight(const T* u, int64_t stride, int64_t samples, const T* grad_u_hat,
                            T* grad_weight) const {
        constexpr int Wide = register_bytes == 64 ? 4 : 2;
        int64_t r = 0;
        for (; r + Wide * vec_width<T> <= padded_; r += Wide * vec_width<T>) {
            gradient_of_weight_columns<Wide>(u, stride, samples, grad_u_hat + r, grad_weight + r);
        }
        for (; r < padded_; r += vec_width<T>) {
            gradient_of_weight_columns<1>(u, stride, samples, grad_u_hat + r, grad_weight + r);
        }
    }

    template <int Wide>
    CAPSOPS_INLINE void gradient_of_weight_columns(const T* u, int64_t stride, int64_t samples,
                                                   const T* grad_u_hat, T* grad_weight) const {
        int64_t k = 0;
        for (; k + 4 <= K_; k += 4) {
            gradient_of_weight_tile<Wide, 4>(u + k, stride, samples, grad_u_hat, grad_weight + k * padded_);
        }
        for (; k < K_; ++k) {
            gradient_of_weight_tile<Wide, 1>(u + k, stride, samples, grad_u_hat, grad_weight + k * padded_);
        }
    }

    template <int Wide, int Tile>
    CAPSOPS_INLINE void gradient_of_weight_tile(const T* u, int64_t stride, int64_t samples,
                                                const T* grad_u_hat, T* grad_weight) const {
        Vec<T> total[Tile][Wide];
#pragma GCC unroll 4
        for (int k = 0; k < Tile; ++k) {
#pragma GCC unroll 4
            for (int n = 0; n < Wide; ++n)
                total[k][n] = load<T>(grad_weight + k * padded_ + n * vec_width<T>);
        }
        for (int64_t b = 0; b < samples; ++b) {
            Vec<T> g[Wide];
#pragma GCC unroll 4
            for (int n = 0; n < Wide; ++n) g[n] = load<T>(grad_u_hat + b * padded_ + n * vec_width<T>);
#pragma GCC unroll 4
            for (int k = 0; k < Tile; ++k) {
#pragma GCC unroll 4
                for (int n = 0; n < Wide; ++n) total[k][n] += u[b * stride + k] * g[n];
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < Tile; ++k) {
#pragma GCC unroll 4
            for (int n = 0; n < Wide; ++n)
                store<T>(grad_weight + k * padded_ + n * vec_width<T>, total[k][n]);
        }
    }

    // Writes ∂u of a chunk and lane group.
    void write_grad_u(const Scratch& s, int64_t g, int64_t i0, int64_t count, int64_t samples) const {
        const int64_t numbers = count * K_;
        transpose_block(reinterpret_cast<const T*>(s.grad_u), L, numbers, L, s.u_rows, numbers);
        for (int64_t lane = 0; lane < samples; ++lane) {
            clear_absent(call_, g * L + lane, i0, count, K_, s.u_rows + lane * numbers);
            write_row(call_.grad_u, call_.dtype, ((g * L + lane) * I_ + i0) * K_, numbers,
                      s.u_rows + lane * numbers);
        }
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
