// Passes over u and weight with the samples of the batch in the lanes of a register.
//
// A lane group is 16 (or 8) samples. û of one pair (i, j) is then D registers, its product with V needs no
// sums over lanes, and the softmax over j is element-wise. û of one i, J·D registers, stays in the
// first-level cache between the logits and the sum. A chunk of input capsules is run for several lane groups,
// so that W comes from memory once for all of them.
//
// The gradient pass gives each thread a range of i, and so ∂W_i and ∂u_i whole: nothing is reduced between
// threads.
#pragma once

#include "dtype_convert.h"
#include "softmax.h"
#include "threading.h"
#include "transpose.h"

namespace capsops {
namespace CAPSOPS_ISA {

template <typename T>
class BatchSimdEngine {
    static constexpr int L = lane_group<T>;
    // Products summed in a row before they join a larger sum: sums of sums lose less to rounding.
    static constexpr int longest_sum = 32, longest_uniform_sum = 64;

    const RoutingCall& call_;
    const int64_t B_, I_, J_, D_, K_, R_;  // R = J·D
    const int64_t groups_;                 // lane groups
    const int64_t padded_;                 // R in whole registers
    int64_t chunk_;                        // input capsules taken together
    int64_t block_;                        // lane groups that share a chunk of W
    const int64_t slots_;
    T* states_;  // [slots, groups, R, L]

    struct Scratch {
        T* natural;        // u of a chunk [L, chunk·K]
        Lanes<T>* u;       // [chunk·K]
        T* weight;         // of a chunk [chunk, R, K], where it is not read in place
        Lanes<T>* u_hat;   // of one i [R]; then ∂û
        Lanes<T>* dots;    // [slots, J]
        Lanes<T>* sum;     // [block, R]
        Lanes<T>* part;    // of a chunk [R]: sums of sums lose less to rounding
        Lanes<T>* grad_u;  // [chunk·K]
        T* turned;         // ∂û of one i [L, padded]
        T* grad_weight;    // of a chunk [chunk, K, padded]
        T* straight;       // ∂W of one i [R, K]

        static Scratch plan(Arena& arena, const BatchSimdEngine& engine, bool gradient) {
            const int64_t R = engine.R_, K = engine.K_, chunk = engine.chunk_;
            const bool copies = !in_place<T>(engine.call_.dtype);
            Scratch scratch{};
            scratch.natural = arena.take<T>(L * chunk * K);
            scratch.u = arena.take<Lanes<T>>(chunk * K);
            scratch.weight = arena.take<T>(copies ? chunk * R * K : 0);
            scratch.u_hat = arena.take<Lanes<T>>(R);
            scratch.dots = arena.take<Lanes<T>>(larger(engine.slots_, 4) * engine.J_);
            scratch.sum = arena.take<Lanes<T>>(gradient ? 0 : engine.block_ * R);
            scratch.part = arena.take<Lanes<T>>(gradient ? 0 : R);
            scratch.grad_u = arena.take<Lanes<T>>(gradient ? chunk * K : 0);
            scratch.turned = arena.take<T>(gradient ? L * engine.padded_ : 0);
            scratch.grad_weight = arena.take<T>(gradient ? chunk * K * engine.padded_ : 0);
            scratch.straight = arena.take<T>(gradient ? R * K : 0);
            return scratch;
        }
    };

    Scratch scratch_of(const Team& team, bool gradient) const {
        Arena mine(pool_ + pool_stride_ * team.rank);
        return Scratch::plan(mine, *this, gradient);
    }

    char* pool_ = nullptr;
    int64_t pool_stride_ = 0;
    void (BatchSimdEngine::*predict_)(const T*, const Lanes<T>*, const Lanes<T>*, int64_t, int64_t, Lanes<T>*,
                                      Lanes<T>*, const Lanes<T>*, Lanes<T>*) const;
    void (BatchSimdEngine::*add_uniform_)(const T*, int64_t, const Lanes<T>*, Lanes<T>*) const;

  public:
    // Parts of the sum over i that are made apart, so that every thread has work.
    int64_t splits = 1;

    // With fewer samples too many lanes are empty (measured: benchmarks/results/NOTES.md).
    static bool suits(const RoutingCall& call) { return call.weight && call.B > larger(1, L / 5); }

    // `slots`: how many states are held at a time.
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
        // As few as leave no thread idle for long: each costs B·J·D numbers.
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

    // Takes over a state [B, J, D] into a slot.
    void prepare(const Team& team, int64_t slot, const T* state) {
        for (int64_t g = team.begin(groups_); g < team.end(groups_); ++g) {
            T* lanes = states_ + (slot * groups_ + g) * R_ * L;
            const int64_t samples = smaller(L, B_ - g * L);
            if (samples < L) std::memset(lanes, 0, R_ * L * sizeof(T));
            transpose_block(state + g * L * R_, R_, samples, R_, lanes, L);
        }
    }

    // partial [splits, B, J, D] = Σ_i û
    CAPSOPS_SHARED_CODE void sum_uniform(const Team& team, int64_t, T* partial) {
        const int64_t few = larger(1, longest_uniform_sum / K_);
        sum_over_i(team, partial, [&](const Scratch& s, const T* w, int64_t count, int64_t, Lanes<T>* sum) {
            for (int64_t n = 0; n < count; n += few) {
                (this->*add_uniform_)(w + n * R_ * K_, smaller(few, count - n), s.u + n * K_, sum);
            }
        });
    }

    // partial = Σ_i c û with the couplings of the state in slot `v`
    CAPSOPS_SHARED_CODE void sum_routed(const Team& team, int64_t, int64_t v, T* partial) {
        sum_over_i(team, partial, [&](const Scratch& s, const T* w, int64_t count, int64_t g, Lanes<T>* sum) {
            sum_scaled(s, w, count, state(v, g), 0, 1, sum, [&](Lanes<T>* dots) {
                softmax(dots, J_, 1, call_.leaky);
                return dots;
            });
        });
    }

    // partial = Σ_i ∂b û with the states in slot `v` (V) and slot `ds` (∂s), two slots side by side
    CAPSOPS_SHARED_CODE void sum_agreement(const Team& team, int64_t, int64_t v, int64_t ds, T* partial) {
        const int64_t apart = (ds - v) * groups_ * R_;
        sum_over_i(team, partial, [&](const Scratch& s, const T* w, int64_t count, int64_t g, Lanes<T>* sum) {
            sum_scaled(s, w, count, state(v, g), apart, 2, sum, [&](Lanes<T>* dots) {
                softmax(dots, J_, 2, call_.leaky);
                softmax_vjp(dots, dots + 1, J_, 2);
                return dots + 1;
            });
        });
    }

    // ∂u and ∂W. Slots: V of `terms` passes, then their ∂s, then, with `uniform`, ∂s of the uniform pass.
    CAPSOPS_SHARED_CODE void gradient(const Team& team, int64_t terms, bool uniform, bool agreement) {
        const int64_t K = K_;
        const Scratch s = scratch_of(team, true);
        std::memset(s.turned, 0, L * padded_ * sizeof(T));
        for (int64_t i0 = team.begin(I_); i0 < team.end(I_); i0 += chunk_) {
            const int64_t count = smaller(chunk_, team.end(I_) - i0);
            const T* w = weight_of(s, i0, count);
            std::memset(s.grad_weight, 0, count * K * padded_ * sizeof(T));
            for (int64_t g = 0; g < groups_; ++g) {
                const int64_t samples = smaller(L, B_ - g * L);
                read_u_by_rows(s, g, i0, count);
                for (int64_t n = 0; n < count; ++n) {
                    const T* w_i = w + n * R_ * K;
                    gradient_of_u_hat(s, w_i, s.u + n * K, g, terms, uniform, agreement);
                    if (call_.grad_u) gradient_of_u(w_i, s.u_hat, s.grad_u + n * K);
                    if (call_.grad_weight) {
                        transpose_block(reinterpret_cast<const T*>(s.u_hat), L, R_, L, s.turned, padded_);
                        gradient_of_weight(s.natural + n * K, count * K, samples, s.turned,
                                           s.grad_weight + n * K * padded_);
                    }
                }
                if (call_.grad_u) write_grad_u(s, g, i0, count, samples);
            }
            for (int64_t n = 0; call_.grad_weight && n < count; ++n) {
                transpose_block(s.grad_weight + n * K * padded_, padded_, K, R_, s.straight, K);
                write_row(call_.grad_weight, call_.dtype, (i0 + n) * R_ * K, R_ * K, s.straight);
            }
        }
    }

    // The couplings of the state in slot `v`, to call.couplings.
    CAPSOPS_SHARED_CODE void couplings(const Team& team, int64_t v) {
        const Scratch s = scratch_of(team, false);
        T* rows = reinterpret_cast<T*>(s.u_hat);  // [L, J]
        over_chunks(team, s, [&](const T* w, int64_t i0, int64_t count, int64_t g) {
            for (int64_t n = 0; n < count; ++n) {
                (this->*predict_)(w + n * R_ * K_, s.u + n * K_, state(v, g), 0, 1, s.u_hat, s.dots, nullptr,
                                  nullptr);
                softmax(s.dots, J_, 1, call_.leaky);
                transpose_block(reinterpret_cast<const T*>(s.dots), L, J_, L, rows, J_);
                for (int64_t b = g * L; b < smaller(B_, (g + 1) * L); ++b) {
                    write_row(call_.couplings, call_.dtype, (b * I_ + i0 + n) * J_, J_,
                              rows + (b - g * L) * J_);
                }
            }
        });
    }

  private:
    // Whether threads that share so many equal tasks are busy nine tenths of the time.
    static bool balanced(int64_t tasks, int64_t threads) {
        return 9 * round_up(tasks, threads) <= 10 * tasks;
    }

    const Lanes<T>* state(int64_t slot, int64_t group) const {
        return reinterpret_cast<const Lanes<T>*>(states_) + (slot * groups_ + group) * R_;
    }

    // The two kernels that multiply by W_i, with K as a constant where it is a usual size, else 0.
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
        if (in_place<T>(call_.dtype)) return static_cast<const T*>(call_.weight) + i0 * R_ * K_;
        read_row(call_.weight, call_.dtype, i0 * R_ * K_, count * R_ * K_, scratch.weight);
        return scratch.weight;
    }

    // u of a chunk in lanes; those without a sample are 0.
    void read_u(const Scratch& scratch, int64_t g, int64_t i0, int64_t count) const {
        if (in_place<T>(call_.dtype) && (g + 1) * L <= B_) {
            const T* u = static_cast<const T*>(call_.u) + (g * L * I_ + i0) * K_;
            transpose_block(u, I_ * K_, L, count * K_, reinterpret_cast<T*>(scratch.u), L);
        } else {
            read_u_by_rows(scratch, g, i0, count);
        }
    }

    // The same, and in rows.
    void read_u_by_rows(const Scratch& scratch, int64_t g, int64_t i0, int64_t count) const {
        const int64_t numbers = count * K_;
        for (int64_t lane = 0; lane < L; ++lane) {
            T* row = scratch.natural + lane * numbers;
            const int64_t b = g * L + lane;
            if (b < B_) {
                read_row(call_.u, call_.dtype, (b * I_ + i0) * K_, numbers, row);
            } else {
                std::memset(row, 0, numbers * sizeof(T));
            }
        }
        transpose_block(scratch.natural, numbers, L, numbers, reinterpret_cast<T*>(scratch.u), L);
    }

    // work(scratch, W of the chunk, its input capsules, lane group, sum [R]) for this thread's share of
    // (split, lane group); writes the sums as partial [splits, B, R].
    template <typename Work>
    void sum_over_i(const Team& team, T* partial, const Work& work) {
        const Scratch scratch = scratch_of(team, false);
        const int64_t tasks = splits * groups_;
        for (int64_t task = team.begin(tasks); task < team.end(tasks);) {
            const int64_t split = task / groups_, g0 = task % groups_;
            const int64_t g1 = smaller(smaller(groups_, g0 + block_), g0 + team.end(tasks) - task);
            std::memset(scratch.sum, 0, (g1 - g0) * R_ * sizeof(Lanes<T>));
            const int64_t end = I_ * (split + 1) / splits;
            for (int64_t i0 = I_ * split / splits; i0 < end; i0 += chunk_) {
                const int64_t count = smaller(chunk_, end - i0);
                const T* w = weight_of(scratch, i0, count);
                for (int64_t g = g0; g < g1; ++g) {
                    read_u(scratch, g, i0, count);
                    work(scratch, w, count, g, scratch.sum + (g - g0) * R_);
                }
            }
            for (int64_t g = g0; g < g1; ++g) {
                const T* sum = reinterpret_cast<const T*>(scratch.sum + (g - g0) * R_);
                transpose_block(sum, L, R_, smaller(L, B_ - g * L), partial + (split * B_ + g * L) * R_, R_);
            }
            task += g1 - g0;
        }
    }

    // work(W of the chunk, first input capsule, count, lane group) for this thread's share of i.
    template <typename Work>
    void over_chunks(const Team& team, const Scratch& scratch, const Work& work) {
        for (int64_t i0 = team.begin(I_); i0 < team.end(I_); i0 += chunk_) {
            const int64_t count = smaller(chunk_, team.end(I_) - i0);
            const T* w = weight_of(scratch, i0, count);
            for (int64_t g = 0; g < groups_; ++g) {
                read_u(scratch, g, i0, count);
                work(w, i0, count, g);
            }
        }
    }

    // û of Rows rows of W_i; `aside` is run between the steps over k.
    template <int KC, int Rows, typename Aside>
    CAPSOPS_INLINE void predict_rows(const T* w, const Lanes<T>* u, Lanes<T> (&u_hat)[Rows],
                                     const Aside& aside) const {
        const int64_t K = KC ? KC : K_;
        const Lanes<T> u_0 = u[0];
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) u_hat[r] = product(w[r * K], u_0);
        aside(0);
#pragma GCC unroll 8
        for (int64_t k = 1; k < K; ++k) {
            const Lanes<T> u_k = u[k];
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) add_product(u_hat[r], w[r * K + k], u_k);
            aside(k);
        }
    }

    // Rows rows of û_ij, and what they add to the products with `count` states; the `first` rows begin them.
    // Before, with `sum`, the û that is overwritten is added to it, scaled by c.
    template <int KC, int Rows>
    CAPSOPS_INLINE void predict_tile(const T* w, const Lanes<T>* u, const Lanes<T>* states, int64_t stride,
                                     int64_t count, Lanes<T>* u_hat, Lanes<T>* dots, bool first,
                                     const Lanes<T>* c, Lanes<T>* sum) const {
        constexpr int Sums = Rows < 4 ? Rows : 4;
        constexpr int Each = KC ? (Rows + KC - 1) / KC : 1;  // rows of the sum for every k
        Lanes<T> tile[Rows];
        if (sum) {
            const Lanes<T> scale = *c;
            predict_rows<KC, Rows>(w, u, tile, [=](int64_t k) CAPSOPS_ALWAYS {
#pragma GCC unroll 16
                for (int n = 0; n < Each; ++n) {
                    const int64_t r = k * Each + n;
                    if (r < Rows) add_product(sum[r], scale, u_hat[r]);
                }
            });
            for (int64_t r = (KC ? KC : K_) * Each; r < Rows; ++r) add_product(sum[r], scale, u_hat[r]);
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

    // û of one i [R], and dots [J, count] = û · state of `count` states that lie `stride` apart. With `sum`
    // [R], the û that it overwrites is added to it, scaled by c [J], `count` apart.
    template <int KC>
    __attribute__((noinline)) void predict(const T* w, const Lanes<T>* u, const Lanes<T>* states,
                                           int64_t stride, int64_t count, Lanes<T>* u_hat, Lanes<T>* dots,
                                           const Lanes<T>* c, Lanes<T>* sum) const {
        const int64_t K = KC ? KC : K_;
        for (int64_t j = 0; j < J_; ++j) {
            over_rows(D_, [=](int64_t d, auto rows) CAPSOPS_ALWAYS {
                const int64_t r = j * D_ + d;
                predict_tile<KC, decltype(rows)::value>(w + r * K, u, states + r, stride, count, u_hat + r,
                                                        dots + j * count, d == 0, c ? c + j * count : nullptr,
                                                        sum ? sum + r : nullptr);
            });
        }
    }

    // sum [R] += Σ_i c_i û_i over the input capsules of a chunk, with c = weigh(dots), `count` apart.
    //
    // The sum for one i, which mostly loads and stores, is taken while û of the next is made, which
    // multiplies.
    template <typename Weigh>
    CAPSOPS_INLINE void sum_scaled(const Scratch& s, const T* w, int64_t chunk, const Lanes<T>* states,
                                   int64_t apart, int64_t count, Lanes<T>* sum, const Weigh& weigh) const {
        Lanes<T>*dots = s.dots, *spare = s.dots + count * J_;
        const Lanes<T>* c = nullptr;
        std::memset(s.part, 0, R_ * sizeof(Lanes<T>));
        for (int64_t n = 0; n < chunk; ++n) {
            (this->*predict_)(w + n * R_ * K_, s.u + n * K_, states, apart, count, s.u_hat, dots, c,
                              c ? s.part : nullptr);
            c = weigh(dots);
            Lanes<T>* const used = dots;
            dots = spare;
            spare = used;
        }
        for (int64_t j = 0; j < J_; ++j) {
            const Lanes<T> c_j = c[j * count];
            for (int64_t r = j * D_; r < (j + 1) * D_; ++r) {
                add_product(s.part[r], c_j, s.u_hat[r]);
                sum[r] += s.part[r];
            }
        }
    }

    // Cuts n rows into tiles of constant size.
    template <typename Work>
    static CAPSOPS_INLINE void over_rows(int64_t n, const Work& work) {
        int64_t r = 0;
        for (; r + rows_a_tile <= n; r += rows_a_tile) work(r, std::integral_constant<int, rows_a_tile>{});
        if constexpr (rows_a_tile > 8) {
            if (r + 8 <= n) {
                work(r, std::integral_constant<int, 8>{});
                r += 8;
            }
        }
        if constexpr (rows_a_tile > 4) {
            if (r + 4 <= n) {
                work(r, std::integral_constant<int, 4>{});
                r += 4;
            }
        }
        for (; r < n; ++r) work(r, std::integral_constant<int, 1>{});
    }

    // sum [R] += Σ û over the input capsules of a chunk.
    template <int KC>
    __attribute__((noinline)) void add_uniform(const T* w, int64_t count, const Lanes<T>* u,
                                               Lanes<T>* sum) const {
        const int64_t K = KC ? KC : K_;
        over_rows(R_, [=](int64_t r, auto rows) CAPSOPS_ALWAYS {
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

    // ∂û of one i and lane group, into scratch.u_hat.
    CAPSOPS_INLINE void gradient_of_u_hat(const Scratch& s, const T* w, const Lanes<T>* u, int64_t g,
                                          int64_t terms, bool uniform, bool agreement) const {
        const int64_t apart = groups_ * R_, count = agreement ? 2 * terms : terms;
        if (terms > 0) {
            (this->*predict_)(w, u, state(0, g), apart, count, s.u_hat, s.dots, nullptr, nullptr);
            for (int64_t t = 0; t < terms; ++t) {
                softmax(s.dots + t, J_, count, call_.leaky);
                if (agreement) softmax_vjp(s.dots + t, s.dots + terms + t, J_, count);
            }
        }
        const Lanes<T>* even = state(2 * terms, g);
        for (int64_t j = 0; j < J_; ++j) {
            const Lanes<T>* dots = s.dots + j * count;
            for (int64_t r = j * D_; r < (j + 1) * D_; ++r) {
                Lanes<T> total = uniform ? even[r] : Lanes<T>::filled(0);
                for (int64_t t = 0; t < terms; ++t) {
                    add_product(total, dots[t], state(terms + t, g)[r]);
                    if (agreement) add_product(total, dots[terms + t], state(t, g)[r]);
                }
                s.u_hat[r] = total;
            }
        }
    }

    // ∂u_i = Σ_r W_i[r] ∂û_i[r], a few k at a time.
    void gradient_of_u(const T* w, const Lanes<T>* grad_u_hat, Lanes<T>* grad_u) const {
        const int64_t K = K_;
        constexpr int Tile = 8 / registers_a_lane_group;
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

    // ∂u of a chunk, from lanes to the rows of its samples.
    void write_grad_u(const Scratch& s, int64_t g, int64_t i0, int64_t count, int64_t samples) const {
        const int64_t numbers = count * K_;
        transpose_block(reinterpret_cast<const T*>(s.grad_u), L, numbers, L, s.natural, numbers);
        for (int64_t lane = 0; lane < samples; ++lane) {
            write_row(call_.grad_u, call_.dtype, ((g * L + lane) * I_ + i0) * K_, numbers,
                      s.natural + lane * numbers);
        }
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
