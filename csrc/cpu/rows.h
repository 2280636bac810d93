// Passes for one sample at a time: small batches of u and weight, and predictions that are given.
//
// The numbers of W_i as they lie in memory, [J, D, K], are multiplied by u_i repeated for every (j, d): "parts",
// whose sums over k are û. Products with V (repeated for every k) and sums over i are taken of the parts, so that
// every register is full and the sums over k wait until the end of a pass. With given predictions a part is û
// itself: K = 1 and no multiplication.
#pragma once

#include "block.h"
#include "softmax.h"
#include "storage.h"
#include "team.h"

namespace capsops {
namespace CAPSOPS_ISA {

// N: numbers of a register. Given: whether u is û.
template <typename T, int N, bool Given>
class RowsEngine {
    const RoutingCall& call_;
    const int64_t B_, I_, J_, D_, K_;
    const int64_t numbers_;  // D·K, of one pair (i, j)
    const int64_t padded_;   // the same in whole registers
    const int64_t row_;      // J · padded
    const int64_t logits_;   // J in whole registers
    const int64_t slots_;
    T* states_;  // [slots, B, row]
    char* pool_ = nullptr;
    int64_t pool_stride_ = 0;

    struct Scratch {
        T* u;            // of the samples of one i, repeated [B, padded]
        T* weight;       // W_i, or û_i, where it is not read in place [row]
        T* parts;        // [row]
        T* dots;         // [slots, logits]
        T* sum;          // [B, row]
        T* grad_weight;  // [row]
        T* grad_u;       // [padded]

        static Scratch plan(Pieces& pieces, const RowsEngine& engine) {
            const int64_t samples = Given ? 1 : engine.B_;
            Scratch scratch{};
            scratch.u = pieces.take<T>(samples * engine.padded_);
            scratch.weight = pieces.take<T>(engine.row_);
            scratch.parts = pieces.take<T>(engine.row_);
            scratch.dots = pieces.take<T>(larger(engine.slots_, 2) * engine.logits_);
            scratch.sum = pieces.take<T>(samples * engine.row_);
            scratch.grad_weight = pieces.take<T>(engine.row_);
            scratch.grad_u = pieces.take<T>(engine.padded_);
            return scratch;
        }
    };

    Scratch scratch_of(const Team& team) const {
        Pieces mine{pool_ + pool_stride_ * team.rank};
        return Scratch::plan(mine, *this);
    }

  public:
    // Parts of the sum over i that are made apart, so that every thread has work.
    int64_t splits = 1;

    RowsEngine(const RoutingCall& call, int64_t slots, int threads)
        : call_(call), B_(call.B), I_(call.I), J_(call.J), D_(call.D), K_(Given ? 1 : call.K), numbers_(D_ * K_),
          padded_(rounded_up(numbers_, N)), row_(J_ * padded_), logits_(rounded_up(J_, N)), slots_(slots),
          states_(nullptr) {
        splits = smaller(threads, I_);
    }

    void plan(Pieces& pieces, int threads, bool) {
        states_ = pieces.take<T>(slots_ * B_ * row_);
        Pieces scratch;
        Scratch::plan(scratch, *this);
        pool_stride_ = scratch.used;
        pool_ = pieces.take<char>(pool_stride_ * threads);
    }

    // Takes over a state [B, J, D] into a slot, every number repeated K times.
    void prepare(const Team& team, int64_t slot, const T* state) {
        for (int64_t item = team.begin(B_ * J_); item < team.end(B_ * J_); ++item) {
            T* repeated = states_ + slot * B_ * row_ + item * padded_;
            for (int64_t d = 0; d < D_; ++d) {
                for (int64_t k = 0; k < K_; ++k) repeated[d * K_ + k] = state[item * D_ + d];
            }
            for (int64_t p = numbers_; p < padded_; ++p) repeated[p] = 0;
        }
    }

    // partial [splits, B, J, D] = Σ_i û
    void sum_uniform(const Team& team, T* partial) {
        sum_over_i(team, partial, [&](const Scratch& s, int64_t b, const T* w, const T* u, T* sum) {
            (void)b, (void)s;
            for (int64_t j = 0; j < J_; ++j) {
                for (int64_t p = 0; p < padded_; p += N) {
                    const int64_t at = j * padded_ + p;
                    const Vec<T, N> part = Given ? load<T, N>(w + at) : load<T, N>(w + at) * load<T, N>(u + p);
                    store<T, N>(sum + at, load<T, N>(sum + at) + part);
                }
            }
        });
    }

    // partial = Σ_i c û with the couplings of the state in slot `v`
    void sum_routed(const Team& team, int64_t v, T* partial) {
        sum_over_i(team, partial, [&](const Scratch& s, int64_t b, const T* w, const T* u, T* sum) {
            const T* parts = predict(s, b, w, u, v, 0, 1);
            softmax<T, N>(s.dots, J_, call_.leaky);
            add_scaled(s.dots, parts, sum);
        });
    }

    // partial = Σ_i ∂b û with the states in slot `v` (V) and slot `ds` (∂s)
    void sum_agreement(const Team& team, int64_t v, int64_t ds, T* partial) {
        sum_over_i(team, partial, [&](const Scratch& s, int64_t b, const T* w, const T* u, T* sum) {
            const T* parts = predict(s, b, w, u, v, ds - v, 2);
            softmax<T, N>(s.dots, J_, call_.leaky);
            softmax_vjp(s.dots, s.dots + logits_, J_);
            add_scaled(s.dots + logits_, parts, sum);
        });
    }

    // ∂u and ∂W, or ∂û. Slots: V of `terms` passes, then their ∂s, then, with `uniform`, ∂s of the uniform pass.
    void gradient(const Team& team, int64_t terms, bool uniform, bool agreement) {
        const Scratch s = scratch_of(team);
        over_items(team, s, [&](int64_t i, int64_t b, const T* w, const T* u, bool first, bool last) {
            if (terms > 0) {
                predict(s, b, w, u, 0, 1, agreement ? 2 * terms : terms);
                for (int64_t t = 0; t < terms; ++t) {
                    softmax<T, N>(s.dots + t * logits_, J_, call_.leaky);
                    if (agreement) softmax_vjp(s.dots + t * logits_, s.dots + (terms + t) * logits_, J_);
                }
            }
            gradient_of_u_hat(s, b, terms, uniform, agreement);
            if constexpr (Given) {
                write_rows(call_.grad_u, (b * I_ + i) * J_ * D_, s.parts, s.sum);
            } else {
                if (call_.grad_u) gradient_of_u(s, i, b, w);
                if (call_.grad_weight) {
                    if (first) std::memset(s.grad_weight, 0, row_ * sizeof(T));
                    for (int64_t at = 0; at < row_; at += padded_) {
                        for (int64_t p = at; p < at + padded_; p += N) {
                            const Vec<T, N> product = load<T, N>(s.parts + p) * load<T, N>(u + p - at);
                            store<T, N>(s.grad_weight + p, load<T, N>(s.grad_weight + p) + product);
                        }
                    }
                    if (last) write_rows(call_.grad_weight, i * J_ * numbers_, s.grad_weight, s.sum);
                }
            }
        });
    }

    // The couplings of the state in slot `v`, to call.couplings.
    void couplings(const Team& team, int64_t v) {
        const Scratch s = scratch_of(team);
        over_items(team, s, [&](int64_t i, int64_t b, const T* w, const T* u, bool, bool) {
            predict(s, b, w, u, v, 0, 1);
            softmax<T, N>(s.dots, J_, call_.leaky);
            write_row(call_.couplings, call_.storage, (b * I_ + i) * J_, J_, s.dots);
        });
    }

  private:
    // Numbers [J, numbers] of a tensor from `at` on, in whole registers.
    const T* read_rows(const void* tensor, int64_t at, T* scratch) const {
        if (in_place<T>(call_.storage) && padded_ == numbers_) return static_cast<const T*>(tensor) + at;
        for (int64_t j = 0; j < J_; ++j) {
            read_row(tensor, call_.storage, at + j * numbers_, numbers_, scratch + j * padded_);
            for (int64_t p = numbers_; p < padded_; ++p) scratch[j * padded_ + p] = 0;
        }
        return scratch;
    }

    void write_rows(void* tensor, int64_t at, const T* row, T* scratch) const {
        for (int64_t j = 0; j < J_; ++j) std::memmove(scratch + j * numbers_, row + j * padded_, numbers_ * sizeof(T));
        write_row(tensor, call_.storage, at, J_ * numbers_, scratch);
    }

    // u_i of sample b, repeated for every d.
    void read_u(int64_t i, int64_t b, T* repeated) const {
        read_row(call_.u, call_.storage, (b * I_ + i) * K_, K_, repeated);
        for (int64_t p = K_; p < numbers_; ++p) repeated[p] = repeated[p - K_];
        for (int64_t p = numbers_; p < padded_; ++p) repeated[p] = 0;
    }

    // work(i, sample, W_i or û_i, u_i, first and last sample of this i) for this thread's share.
    template <typename Work>
    void over_items(const Team& team, const Scratch& s, const Work& work) const {
        if constexpr (Given) {
            for (int64_t item = team.begin(B_ * I_); item < team.end(B_ * I_); ++item) {
                const T* row = read_rows(call_.u, item * J_ * D_, s.weight);
                work(item % I_, item / I_, row, static_cast<const T*>(nullptr), true, true);
            }
        } else {
            for (int64_t i = team.begin(I_); i < team.end(I_); ++i) {
                const T* w = read_rows(call_.weight, i * J_ * numbers_, s.weight);
                for (int64_t b = 0; b < B_; ++b) {
                    read_u(i, b, s.u);
                    work(i, b, w, static_cast<const T*>(s.u), b == 0, b == B_ - 1);
                }
            }
        }
    }

    // work(scratch, sample, W_i or û_i, u_i, sum [row]) for this thread's share of the splits, and of the samples
    // where they have predictions of their own; writes the sums as partial [splits, B, J, D].
    template <typename Work>
    void sum_over_i(const Team& team, T* partial, const Work& work) const {
        const Scratch s = scratch_of(team);
        const int64_t samples = Given ? 1 : B_;  // of one task
        const int64_t tasks = splits * B_ / samples;
        for (int64_t task = team.begin(tasks); task < team.end(tasks); ++task) {
            const int64_t split = task % splits, first = task / splits;
            std::memset(s.sum, 0, samples * row_ * sizeof(T));
            for (int64_t i = I_ * split / splits; i < I_ * (split + 1) / splits; ++i) {
                if constexpr (Given) {
                    const T* row = read_rows(call_.u, (first * I_ + i) * J_ * D_, s.weight);
                    work(s, first, row, static_cast<const T*>(nullptr), s.sum);
                } else {
                    const T* w = read_rows(call_.weight, i * J_ * numbers_, s.weight);
                    for (int64_t b = 0; b < B_; ++b) {
                        read_u(i, b, s.u);
                        work(s, b, w, static_cast<const T*>(s.u), s.sum + b * row_);
                    }
                }
            }
            for (int64_t n = 0; n < samples; ++n) {
                fold(s.sum + n * row_, partial + (split * B_ + first + n) * J_ * D_);
            }
        }
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

    // The parts of û_i, and dots [count, logits] = û · state for `count` slots, `apart` from one another.
    CAPSOPS_INLINE const T* predict(const Scratch& s, int64_t b, const T* w, const T* u, int64_t slot, int64_t apart,
                                    int64_t count) const {
        const T* parts = Given ? w : s.parts;
        for (int64_t n = 0; n < count; ++n) {
            const T* v = state(slot + n * apart, b);
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
                store<T, N>(s.dots + n * logits_ + j0, sum_lanes<N>(total));
            }
        }
        return parts;
    }

    // One register of parts: made and kept for the first state, read again for the others.
    static CAPSOPS_INLINE Vec<T, N> part(const T* w, const T* u, T* parts, int64_t n, int64_t at, int64_t p) {
        if constexpr (Given) return load<T, N>(w + at + p);
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

    // ∂û repeated for every k, into scratch.parts.
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

    void gradient_of_u(const Scratch& s, int64_t i, int64_t b, const T* w) const {
        for (int64_t p = 0; p < padded_; p += N) {
            Vec<T, N> total = Vec<T, N>{};
            for (int64_t at = p; at < row_; at += padded_) total += load<T, N>(w + at) * load<T, N>(s.parts + at);
            store<T, N>(s.grad_u + p, total);
        }
        for (int64_t k = 0; k < K_; ++k) {
            for (int64_t d = 1; d < D_; ++d) s.grad_u[k] += s.grad_u[d * K_ + k];
        }
        write_row(call_.grad_u, call_.storage, (b * I_ + i) * K_, K_, s.grad_u);
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
