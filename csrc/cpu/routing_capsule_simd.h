// Passes over u and weight with the numbers of one pair of capsules (i, j) in the lanes of SIMD registers:
// for small batches whose predictions do not fit the cache.
//
// W_i is read as it is in memory, [J, D, K], and multiplied by u_i repeated for every (j, d). The products
// are called parts; their sums over k are û. Dot products with V (repeated for every k) and sums over i are
// made from the parts, so that every register is full and the sums over k wait until the end of a pass.
//
// Where K divides the lanes of a register ("aligned"), u_i is one register for all (j, d) and the parts are
// never made: W_i itself is multiplied by V and summed over d, then multiplied by u_i, and c_j u_i is one
// register. Sums over i are then made for a block of input capsules at a time, so that they are loaded and
// stored once per block. Every other pass goes through i backwards, so that it begins with what the previous
// pass left in the cache.
#pragma once

#include "dtype_convert.h"
#include "softmax.h"
#include "starting_logits.h"
#include "threading.h"
#include "transpose.h"

namespace capsops {
namespace CAPSOPS_ISA {

// N: lanes of a register.
template <typename T, int N>
class CapsuleSimdEngine {
    const RoutingCall& call_;
    const int64_t B_, I_, J_, D_, K_;
    const int64_t numbers_;  // D·K, of one pair (i, j)
    const int64_t padded_;   // D·K rounded up to whole registers
    const int64_t row_;      // J · padded
    const int64_t logits_;   // J rounded up to whole registers
    const int64_t slots_;
    const bool aligned_;
    T* states_;  // [slots, B, row]
    char* pool_ = nullptr;
    int64_t pool_stride_ = 0;

    static constexpr int block = 4;  // input capsules that are processed together

    struct Scratch {
        T* u;            // of one sample, repeated [block, padded]
        T* weight;       // W of a block, if it has to be converted or padded [block, row]
        T* parts;        // [row]
        T* dots;         // for a block or for all slots [block · states, logits]
        T* sum;          // [B, row]
        T* grad_weight;  // [row]
        T* grad_u;       // [padded]
        T* start;        // starting logits of one i, or their gradient [logits]

        static Scratch plan(Arena& arena, const CapsuleSimdEngine& engine) {
            Scratch scratch{};
            scratch.u = arena.take<T>(block * engine.padded_);
            scratch.weight = arena.take<T>(block * engine.row_);
            scratch.parts = arena.take<T>(engine.row_);
            scratch.dots = arena.take<T>(larger(engine.slots_, 2 * block) * engine.logits_);
            scratch.sum = arena.take<T>(engine.B_ * engine.row_);
            scratch.grad_weight = arena.take<T>(engine.row_);
            scratch.grad_u = arena.take<T>(engine.padded_);
            scratch.start = arena.take<T>(engine.call_.logits.data ? engine.logits_ : 0);
            return scratch;
        }
    };

    Scratch scratch_of(const Team& team) const {
        Arena own(pool_ + pool_stride_ * team.rank);
        return Scratch::plan(own, *this);
    }

  public:
    // The sum over i is split into so many parts, so that every thread has work.
    int64_t splits = 1;
    static constexpr bool threads_own_inputs = true;  // in the gradient pass
    const LogitsGradient<T>* grad_logits = nullptr;   // null where it is not needed

    CapsuleSimdEngine(const RoutingCall& call, int64_t slots, int threads)
        : call_(call),
          B_(call.B),
          I_(call.I),
          J_(call.J),
          D_(call.D),
          K_(call.K),
          numbers_(D_ * K_),
          padded_(round_up(numbers_, N)),
          row_(J_ * padded_),
          logits_(round_up(J_, N)),
          slots_(slots),
          aligned_(N % K_ == 0 && padded_ == numbers_),
          states_(nullptr) {
        splits = smaller(threads, I_);
    }

    void plan(Arena& arena, int threads, bool) {
        states_ = arena.take<T>(slots_ * B_ * row_);
        Arena scratch;
        Scratch::plan(scratch, *this);
        pool_stride_ = scratch.used();
        pool_ = arena.take<char>(pool_stride_ * threads);
    }

    // Copies a state [B, J, D] (V or ∂s of a pass) to a slot, with every number repeated K times.
    void prepare(const Team& team, int64_t slot, const T* state) {
        for (int64_t item = team.begin(B_ * J_); item < team.end(B_ * J_); ++item) {
            T* repeated = states_ + slot * B_ * row_ + item * padded_;
            for (int64_t d = 0; d < D_; ++d) {
                for (int64_t k = 0; k < K_; ++k) repeated[d * K_ + k] = state[item * D_ + d];
            }
            for (int64_t p = numbers_; p < padded_; ++p) repeated[p] = 0;
        }
    }

    // partial [splits, B, J, D] = Σ_i û; every other pass goes through i backwards
    CAPSOPS_NOINLINE void sum_uniform(const Team& team, int64_t pass, T* partial) {
        sum_over_i(team, pass, partial,
                   [&](const Scratch& s, int64_t, const T* w, int64_t, int64_t count, T* sum) {
                       if (aligned_) {
                           Vec<T, N> u[block];
                           for (int64_t j = 0; j < J_; ++j) {
                               for (int64_t n = 0; n < count; ++n) u[n] = load<T, N>(s.u + n * padded_);
                               add_block(w + j * padded_, u, count, sum + j * padded_);
                           }
                           return;
                       }
                       for (int64_t at = 0; at < row_; at += padded_) {
                           for (int64_t p = at; p < at + padded_; p += N) {
                               Vec<T, N> total = Vec<T, N>{};
                               for (int64_t n = 0; n < count; ++n) {
                                   Vec<T, N> x = load<T, N>(w + n * row_ + p);
                                   x *= load<T, N>(s.u + n * padded_ + p - at);
                                   total += x;
                               }
                               store<T, N>(sum + p, load<T, N>(sum + p) + total);
                           }
                       }
                   });
    }

    // partial = Σ_i c û with the couplings of the state in slot `v`
    CAPSOPS_NOINLINE void sum_routed(const Team& team, int64_t pass, int64_t v, T* partial) {
        sum_scaled<1>(team, pass, v, 0, partial, [&](const Scratch& s, int64_t b, int64_t i, T* dots) {
            couple(s, b, i, dots, 1);
            return dots;
        });
    }

    // partial = Σ_i ∂b û with V in slot `v` and ∂s in slot `ds`
    CAPSOPS_NOINLINE void sum_agreement(const Team& team, int64_t pass, int64_t v, int64_t ds, T* partial) {
        sum_scaled<2>(team, pass, v, ds - v, partial, [&](const Scratch& s, int64_t b, int64_t i, T* dots) {
            couple(s, b, i, dots, 1);
            softmax_vjp(dots, dots + logits_, J_);
            return dots + logits_;
        });
    }

    // Computes ∂u and ∂W. The slots are V of `terms` passes, then their ∂s, then, with `uniform`, the
    // scaled ∂s of the first pass. `agreement`: whether the gradient flows through the logits too.
    CAPSOPS_NOINLINE void gradient(const Team& team, int64_t terms, bool uniform, bool agreement) {
        const Scratch s = scratch_of(team);
        const bool needs_b = agreement || grad_logits;
        const int64_t states = needs_b ? 2 * terms : terms;
        for_items(team, s, [&](int64_t i, int64_t b, const T* w, bool first, bool last) {
            if (aligned_) {
                dots_of_all(s, b, w, states);
            } else {
                predict(s, b, w, s.u, 0, 1, states, s.dots);
            }
            couple(s, b, i, s.dots, terms);
            for (int64_t t = 0; needs_b && t < terms; ++t)
                softmax_vjp(s.dots + t * logits_, s.dots + (terms + t) * logits_, J_);
            if (grad_logits) gradient_of_logits(team, s, b, i, terms);
            gradient_of_u_hat(s, b, terms, uniform, agreement);
            if (call_.grad_u) gradient_of_u(s, i, b, w);
            if (call_.grad_weight) gradient_of_weight(s, i, first, last);
        });
    }

    // Writes the couplings of the state in slot `v` to call.couplings.
    CAPSOPS_NOINLINE void couplings(const Team& team, int64_t v) {
        const Scratch s = scratch_of(team);
        for_items(team, s, [&](int64_t i, int64_t b, const T* w, bool, bool) {
            if (aligned_) {
                products<1>(w, load<T, N>(s.u), state(v, b), 0, s.dots);
            } else {
                predict(s, b, w, s.u, v, 0, 1, s.dots);
            }
            couple(s, b, i, s.dots, 1);
            if (!is_present(call_, b, i)) std::memset(s.dots, 0, J_ * sizeof(T));
            write_row(call_.couplings, call_.dtype, (b * I_ + i) * J_, J_, s.dots);
        });
    }

  private:
    // Rows of `numbers_` numbers of W, beginning at `at`, each padded to whole registers.
    const T* read_weight(int64_t at, int64_t rows, T* scratch) const {
        if (is_native<T>(call_.dtype) && padded_ == numbers_) return static_cast<const T*>(call_.weight) + at;
        for (int64_t j = 0; j < rows; ++j) {
            read_row(call_.weight, call_.dtype, at + j * numbers_, numbers_, scratch + j * padded_);
            for (int64_t p = numbers_; p < padded_; ++p) scratch[j * padded_ + p] = 0;
        }
        return scratch;
    }

    void write_grad_weight(int64_t at, const T* row, T* scratch) const {
        for (int64_t j = 0; j < J_; ++j)
            std::memmove(scratch + j * numbers_, row + j * padded_, numbers_ * sizeof(T));
        write_row(call_.grad_weight, call_.dtype, at, J_ * numbers_, scratch);
    }

    // Reads u_i of sample b, repeated to fill one register if aligned, else repeated for every d.
    void read_u(int64_t i, int64_t b, T* repeated) const {
        const int64_t end = aligned_ ? N : numbers_;
        read_row(call_.u, call_.dtype, (b * I_ + i) * K_, K_, repeated);
        if (!is_present(call_, b, i)) std::memset(repeated, 0, K_ * sizeof(T));
        for (int64_t p = K_; p < end; p += K_) std::memcpy(repeated + p, repeated, K_ * sizeof(T));
        for (int64_t p = numbers_; p < padded_; ++p) repeated[p] = 0;
    }

    // Calls work(i, sample, W_i, is the first sample of this i, is the last) for this thread's share. u_i is
    // in scratch.u.
    template <typename Work>
    void for_items(const Team& team, const Scratch& s, const Work& work) const {
        for (int64_t i = team.begin(I_); i < team.end(I_); ++i) {
            const T* w = read_weight(i * J_ * numbers_, J_, s.weight);
            for (int64_t b = 0; b < B_; ++b) {
                read_u(i, b, s.u);
                work(i, b, w, b == 0, b == B_ - 1);
            }
        }
    }

    // Calls work(scratch, sample, W of a block, its first input capsule, their number, sum [row]) for this
    // thread's share of the splits. u of the block is in scratch.u. Writes the sums to partial [splits, B, J,
    // D].
    template <typename Work>
    void sum_over_i(const Team& team, int64_t pass, T* partial, const Work& work) const {
        const Scratch s = scratch_of(team);
        const bool backwards = pass & 1;
        for (int64_t split = team.begin(splits); split < team.end(splits); ++split) {
            const int64_t begin = I_ * split / splits, end = I_ * (split + 1) / splits;
            const int64_t blocks = divide_up(end - begin, block);
            std::memset(s.sum, 0, B_ * row_ * sizeof(T));
            for (int64_t n = 0; n < blocks; ++n) {
                const int64_t i0 = begin + (backwards ? blocks - 1 - n : n) * block;
                const int64_t count = smaller(block, end - i0);
                const T* w = read_weight(i0 * J_ * numbers_, count * J_, s.weight);
                for (int64_t b = 0; b < B_; ++b) {
                    for (int64_t m = 0; m < count; ++m) read_u(i0 + m, b, s.u + m * padded_);
                    work(s, b, w, i0, count, s.sum + b * row_);
                }
            }
            for (int64_t b = 0; b < B_; ++b) fold(s.sum + b * row_, partial + (split * B_ + b) * J_ * D_);
        }
    }

    // partial = Σ_i c û with c = coefficients(scratch, sample, input capsule, dots). dots [States, logits]
    // are the dot products of û with the States states in slots `v`, `v + stride`, …
    template <int States, typename Coefficients>
    void sum_scaled(const Team& team, int64_t pass, int64_t v, int64_t stride, T* partial,
                    const Coefficients& coefficients) {
        sum_over_i(team, pass, partial,
                   [&](const Scratch& s, int64_t b, const T* w, int64_t i0, int64_t count, T* sum) {
                       if (!aligned_) {
                           for (int64_t n = 0; n < count; ++n) {
                               const T* parts =
                                   predict(s, b, w + n * row_, s.u + n * padded_, v, stride, States, s.dots);
                               add_scaled(coefficients(s, b, i0 + n, s.dots), parts, sum);
                           }
                           return;
                       }
                       Vec<T, N> u[block], scaled[block];
                       const T* c[block];
                       for (int64_t n = 0; n < count; ++n) {
                           u[n] = load<T, N>(s.u + n * padded_);
                           T* dots = s.dots + n * States * logits_;
                           products<States>(w + n * row_, u[n], state(v, b), stride * B_ * row_, dots);
                       }
                       for (int64_t n = 0; n < count; ++n)
                           c[n] = coefficients(s, b, i0 + n, s.dots + n * States * logits_);
                       for (int64_t j = 0; j < J_; ++j) {
                           for (int64_t n = 0; n < count; ++n) scaled[n] = c[n][j] * u[n];
                           add_block(w + j * padded_, scaled, count, sum + j * padded_);
                       }
                   });
    }

    // sum [padded] += Σ_n x_n W_n over the input capsules of a block, whose W are a row apart.
    CAPSOPS_INLINE void add_block(const T* w, const Vec<T, N>* x, int64_t count, T* sum) const {
        if (count == block) {
            const Vec<T, N> x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
            for (int64_t p = 0; p < padded_; p += N) {
                const Vec<T, N> one = load<T, N>(sum + p) + x0 * load<T, N>(w + p);
                const Vec<T, N> other = x1 * load<T, N>(w + row_ + p);
                store<T, N>(sum + p, (one + x2 * load<T, N>(w + 2 * row_ + p)) +
                                         (other + x3 * load<T, N>(w + 3 * row_ + p)));
            }
            return;
        }
        for (int64_t n = 0; n < count; ++n) {
            for (int64_t p = 0; p < padded_; p += N) {
                store<T, N>(sum + p, load<T, N>(sum + p) + x[n] * load<T, N>(w + n * row_ + p));
            }
        }
    }

    // Aligned: dots [States, logits] = û · state for States states that are `stride` apart.
    template <int States>
    CAPSOPS_INLINE void products(const T* w, Vec<T, N> u, const T* states, int64_t stride, T* dots) const {
        for (int64_t j0 = 0; j0 < J_; j0 += N) {
            Vec<T, N> total[States][N];
            const int64_t rows = smaller(N, J_ - j0);
            for (int64_t j = 0; j < rows; ++j) {
                const int64_t at = (j0 + j) * padded_;
                Vec<T, N> one[States], other[States];
                for (int n = 0; n < States; ++n) one[n] = other[n] = Vec<T, N>{};
                int64_t p = at;
                for (; p + 2 * N <= at + padded_; p += 2 * N) {
                    const Vec<T, N> w0 = load<T, N>(w + p), w1 = load<T, N>(w + p + N);
                    for (int n = 0; n < States; ++n) {
                        one[n] += w0 * load<T, N>(states + n * stride + p);
                        other[n] += w1 * load<T, N>(states + n * stride + p + N);
                    }
                }
                if (p < at + padded_) {
                    for (int n = 0; n < States; ++n)
                        one[n] += load<T, N>(w + p) * load<T, N>(states + n * stride + p);
                }
                for (int n = 0; n < States; ++n) total[n][j] = (one[n] + other[n]) * u;
            }
            for (int n = 0; n < States; ++n) {
                for (int64_t j = rows; j < N; ++j) total[n][j] = Vec<T, N>{};
                store<T, N>(dots + n * logits_ + j0, sum_lanes<N>(total[n]));
            }
        }
    }

    // Aligned: dots [count, logits] for the first `count` slots, a few at a time.
    void dots_of_all(const Scratch& s, int64_t b, const T* w, int64_t count) const {
        const Vec<T, N> u = load<T, N>(s.u);
        int64_t n = 0;
        for (; n + 4 <= count; n += 4) products<4>(w, u, state(n, b), B_ * row_, s.dots + n * logits_);
        for (; n + 2 <= count; n += 2) products<2>(w, u, state(n, b), B_ * row_, s.dots + n * logits_);
        for (; n < count; ++n) products<1>(w, u, state(n, b), B_ * row_, s.dots + n * logits_);
    }

    // Turns logits û · V, a row for each of `terms` passes, into couplings.
    CAPSOPS_INLINE void couple(const Scratch& s, int64_t b, int64_t i, T* dots, int64_t terms) const {
        if (call_.logits.data) {
            read_logits(call_, b, i, s.start);
            if (call_.iterations == 0) return open_pairs(s.start, dots, J_);
            for (int64_t t = 0; t < terms; ++t) {
                for (int64_t j = 0; j < J_; ++j) dots[t * logits_ + j] += s.start[j];
            }
        }
        for (int64_t t = 0; t < terms; ++t)
            softmax<T, N>(dots + t * logits_, J_, call_.leaky, call_.logits.data != nullptr);
    }

    // Adds Σ_t ∂b, which follow the couplings in scratch.dots, to the gradient of the starting logits.
    void gradient_of_logits(const Team& team, const Scratch& s, int64_t b, int64_t i, int64_t terms) const {
        for (int64_t j = 0; j < J_; ++j) {
            s.start[j] = 0;
            for (int64_t t = 0; t < terms; ++t) s.start[j] += s.dots[(terms + t) * logits_ + j];
        }
        grad_logits->add(team.rank, b, i, s.start);
    }

    // Sums over k: [J, padded] → [J, D].
    void fold(const T* parts, T* out) const {
        for (int64_t j = 0; j < J_; ++j) {
            for (int64_t d = 0; d < D_; ++d) {
                T total = 0;
                for (int64_t k = 0; k < K_; ++k) total += parts[j * padded_ + d * K_ + k];
                out[j * D_ + d] = total;
            }
        }
    }

    const T* state(int64_t slot, int64_t b) const { return states_ + (slot * B_ + b) * row_; }

    // Computes the parts of û_i, and dots [count, logits] = û · state for `count` slots that are `stride`
    // apart.
    const T* predict(const Scratch& s, int64_t b, const T* w, const T* u, int64_t slot, int64_t stride,
                     int64_t count, T* dots) const {
        for (int64_t n = 0; n < count; ++n) {
            const T* v = state(slot + n * stride, b);
            for (int64_t j0 = 0; j0 < J_; j0 += N) {
                Vec<T, N> total[N];
                const int64_t rows = smaller(N, J_ - j0);
                for (int64_t j = 0; j < rows; ++j) {
                    const int64_t at = (j0 + j) * padded_;
                    Vec<T, N> one = Vec<T, N>{}, other = Vec<T, N>{};
                    int64_t p = 0;
                    for (; p + 2 * N <= padded_; p += 2 * N) {
                        one += part(w, u, s.parts, n, at, p) * load<T, N>(v + at + p);
                        other += part(w, u, s.parts, n, at, p + N) * load<T, N>(v + at + p + N);
                    }
                    if (p < padded_) one += part(w, u, s.parts, n, at, p) * load<T, N>(v + at + p);
                    total[j] = one + other;
                }
                for (int64_t j = rows; j < N; ++j) total[j] = Vec<T, N>{};
                store<T, N>(dots + n * logits_ + j0, sum_lanes<N>(total));
            }
        }
        return s.parts;
    }

    // One register of parts: computed and stored for the first state, loaded for the others.
    static CAPSOPS_INLINE Vec<T, N> part(const T* w, const T* u, T* parts, int64_t n, int64_t at, int64_t p) {
        if (n > 0) return load<T, N>(parts + at + p);
        const Vec<T, N> x = load<T, N>(w + at + p) * load<T, N>(u + p);
        store<T, N>(parts + at + p, x);
        return x;
    }

    void add_scaled(const T* c, const T* parts, T* sum) const {
        for (int64_t j = 0; j < J_; ++j) {
            const T c_j = c[j];
            for (int64_t p = j * padded_; p < (j + 1) * padded_; p += N) {
                store<T, N>(sum + p, load<T, N>(sum + p) + c_j * load<T, N>(parts + p));
            }
        }
    }

    // Writes ∂û, repeated for every k, to scratch.parts.
    void gradient_of_u_hat(const Scratch& s, int64_t b, int64_t terms, bool uniform, bool agreement) const {
        for (int64_t j = 0; j < J_; ++j) {
            for (int64_t p = j * padded_; p < (j + 1) * padded_; p += N) {
                Vec<T, N> total = uniform ? load<T, N>(state(2 * terms, b) + p) : Vec<T, N>{};
                for (int64_t t = 0; t < terms; ++t) {
                    total += s.dots[t * logits_ + j] * load<T, N>(state(terms + t, b) + p);
                    if (agreement) total += s.dots[(terms + t) * logits_ + j] * load<T, N>(state(t, b) + p);
                }
                store<T, N>(s.parts + p, total);
            }
        }
    }

    // ∂W_i += ∂û_i u_i. The first sample initialises the sum; after the last it is written out.
    void gradient_of_weight(const Scratch& s, int64_t i, bool first, bool last) const {
        const bool direct = first && last && is_native<T>(call_.dtype) && padded_ == numbers_;
        T* total = direct ? static_cast<T*>(call_.grad_weight) + i * row_ : s.grad_weight;
        for (int64_t at = 0; at < row_; at += padded_) {
            for (int64_t p = 0; p < padded_; p += N) {
                const Vec<T, N> product = load<T, N>(s.parts + at + p) * load<T, N>(s.u + (aligned_ ? 0 : p));
                store<T, N>(total + at + p, first ? product : load<T, N>(total + at + p) + product);
            }
        }
        if (last && !direct) write_grad_weight(i * J_ * numbers_, total, s.sum);
    }

    void gradient_of_u(const Scratch& s, int64_t i, int64_t b, const T* w) const {
        for (int64_t p = 0; p < padded_; p += N) {
            Vec<T, N> total = Vec<T, N>{};
            for (int64_t at = p; at < row_; at += padded_)
                total += load<T, N>(w + at) * load<T, N>(s.parts + at);
            store<T, N>(s.grad_u + p, total);
        }
        for (int64_t k = 0; k < K_; ++k) {
            for (int64_t d = 1; d < D_; ++d) s.grad_u[k] += s.grad_u[d * K_ + k];
            if (!is_present(call_, b, i)) s.grad_u[k] = 0;
        }
        write_row(call_.grad_u, call_.dtype, (b * I_ + i) * K_, K_, s.grad_u);
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
