// Passes over precomputed predictions of a few input capsules, for many samples, which lie in the lanes of
// SIMD registers: what SegCaps routes at every position of a feature map.
//
// The call is one lane group of the batch, whose predictions stay in the cache from pass to pass.
#pragma once

#include "dtype_convert.h"
#include "sample_lanes.h"
#include "threading.h"
#include "transpose.h"

namespace capsops {
namespace CAPSOPS_ISA {

template <typename T>
class SmallSimdEngine {
    static constexpr int L = lane_group<T>;
    const RoutingCall& call_;
    const int64_t B_, I_, J_, D_, R_;  // R = J·D
    const int64_t slots_;
    Lanes<T>* states_;  // [slots, R]
    char* scratch_ = nullptr;

    struct Scratch {
        T* rows;          // û of one i as it is in memory, then ∂û [L, R]
        Lanes<T>* u_hat;  // of one i [R]; in the gradient then ∂û
        Lanes<T>* dots;   // [J, slots]
        Lanes<T>* sum;    // [R]
        SampleLanes<T> lanes;

        Scratch(Arena& arena, const SmallSimdEngine& engine)
            : rows(arena.take<T>(L * engine.R_)),
              u_hat(arena.take<Lanes<T>>(engine.R_)),
              dots(arena.take<Lanes<T>>(larger(engine.slots_, 2) * engine.J_)),
              sum(arena.take<Lanes<T>>(engine.R_)),
              lanes(engine.call_, arena) {}
    };

    Scratch scratch() const {
        Arena own(scratch_);
        return Scratch(own, *this);
    }

  public:
    static constexpr int64_t splits = 1;
    static constexpr int samples = L;                  // of a call
    static constexpr bool threads_own_inputs = false;  // in the gradient pass
    const LogitsGradient<T>* grad_logits = nullptr;    // null where it is not needed
    int64_t first_sample = 0;                          // number of the first sample in the whole call
    int first_rank = 0;                                // likewise of the thread

    // Not of couplings, nor where many of the threads would have no lane group.
    static bool supports(RoutingOp op, const RoutingCall& call, int threads) {
        return op != RoutingOp::couplings && !call.weight && !call.shared && call.B >= L &&
               2 * divide_up(call.B, L) >= threads && call.I < 2 * L &&
               call.I * call.J * call.D * int64_t(sizeof(Lanes<T>)) <= (int64_t(1) << 18);
    }

    SmallSimdEngine(const RoutingCall& call, int64_t slots, int)
        : call_(call),
          B_(call.B),
          I_(call.I),
          J_(call.J),
          D_(call.D),
          R_(J_ * D_),
          slots_(slots),
          states_(nullptr) {}

    void plan(Arena& arena, int, bool) {
        states_ = arena.take<Lanes<T>>(slots_ * R_);
        Arena measure;
        Scratch(measure, *this);
        scratch_ = arena.take<char>(measure.used());
    }

    // Copies a state [B, J, D] (V or ∂s of a pass) to a slot; lanes without a sample are 0.
    void prepare(const Team&, int64_t slot, const T* state) {
        T* lanes = reinterpret_cast<T*>(states_ + slot * R_);
        if (B_ < L) std::memset(lanes, 0, R_ * L * sizeof(T));
        transpose_block(state, R_, B_, R_, lanes, L);
    }

    // partial [B, J, D] = Σ_i û
    CAPSOPS_NOINLINE void sum_uniform(const Team&, int64_t, T* partial) {
        sum_over_i(partial, [&](const Scratch& s, int64_t) {
            for (int64_t r = 0; r < R_; ++r) s.sum[r] += s.u_hat[r];
        });
    }

    // partial = Σ_i c û with the couplings of the state in slot `v`
    CAPSOPS_NOINLINE void sum_routed(const Team&, int64_t, int64_t v, T* partial) {
        sum_over_i(partial, [&](const Scratch& s, int64_t i) {
            products(s, v, 0, 1);
            s.lanes.couple(0, i, s.dots, 1, 1);
            add_scaled(s, s.dots, 1);
        });
    }

    // partial = Σ_i ∂b û with V in slot `v` and ∂s in slot `ds`
    CAPSOPS_NOINLINE void sum_agreement(const Team&, int64_t, int64_t v, int64_t ds, T* partial) {
        sum_over_i(partial, [&](const Scratch& s, int64_t i) {
            products(s, v, ds - v, 2);
            s.lanes.couple(0, i, s.dots, 1, 2);
            softmax_vjp(s.dots, s.dots + 1, J_, 2);
            add_scaled(s, s.dots + 1, 2);
        });
    }

    // Computes ∂û. The slots are V of `terms` passes, then their ∂s, then, with `uniform`, the scaled ∂s of
    // the first pass. `agreement`: whether the gradient flows through the logits too.
    CAPSOPS_NOINLINE void gradient(const Team&, int64_t terms, bool uniform, bool agreement) {
        const Scratch s = scratch();
        const bool needs_b = agreement || grad_logits;
        const int64_t count = needs_b ? 2 * terms : terms;
        for (int64_t i = 0; i < I_; ++i) {
            read_u_hat(s, i);
            products(s, 0, 1, count);
            s.lanes.couple(0, i, s.dots, terms, count);
            for (int64_t t = 0; needs_b && t < terms; ++t)
                softmax_vjp(s.dots + t, s.dots + terms + t, J_, count);
            if (grad_logits)
                s.lanes.add_gradient(*grad_logits, first_rank, 0, first_sample, i, terms, s.dots);
            for (int64_t r = 0; r < R_; ++r) {
                const Lanes<T>* dots = s.dots + r / D_ * count;
                Lanes<T> total = uniform ? state(2 * terms)[r] : Lanes<T>::filled(0);
                for (int64_t t = 0; t < terms; ++t) {
                    add_product(total, dots[t], state(terms + t)[r]);
                    if (agreement) add_product(total, dots[terms + t], state(t)[r]);
                }
                s.u_hat[r] = total;
            }
            write_gradient(s, i);
        }
    }

    void couplings(const Team&, int64_t) {}  // never called, see supports()

  private:
    const Lanes<T>* state(int64_t slot) const { return states_ + slot * R_; }

    // û of one i; 0 in lanes without a sample, and where an input capsule is absent.
    void read_u_hat(const Scratch& s, int64_t i) const {
        T* lanes = reinterpret_cast<T*>(s.u_hat);
        if (is_native<T>(call_.u_hat_dtype) && !call_.mask && B_ == L)
            return transpose_block(static_cast<const T*>(call_.u) + i * R_, I_ * R_, L, R_, lanes, L);
        for (int64_t b = 0; b < L; ++b) {
            if (b < B_ && is_present(call_, b, i)) {
                read_row(call_.u, call_.u_hat_dtype, (b * I_ + i) * R_, R_, s.rows + b * R_);
            } else {
                std::memset(s.rows + b * R_, 0, R_ * sizeof(T));
            }
        }
        transpose_block(s.rows, R_, L, R_, lanes, L);
    }

    void write_gradient(const Scratch& s, int64_t i) const {
        const T* lanes = reinterpret_cast<const T*>(s.u_hat);
        if (is_native<T>(call_.u_hat_dtype) && !call_.mask) {
            T* grad = static_cast<T*>(call_.grad_u) + i * R_;
            return transpose_block(lanes, L, R_, B_, grad, I_ * R_);
        }
        transpose_block(lanes, L, R_, L, s.rows, R_);
        for (int64_t b = 0; b < B_; ++b) {
            if (!is_present(call_, b, i)) std::memset(s.rows + b * R_, 0, R_ * sizeof(T));
            write_row(call_.grad_u, call_.u_hat_dtype, (b * I_ + i) * R_, R_, s.rows + b * R_);
        }
    }

    template <typename Work>
    void sum_over_i(T* partial, const Work& work) const {
        const Scratch s = scratch();
        std::memset(s.sum, 0, R_ * sizeof(Lanes<T>));
        for (int64_t i = 0; i < I_; ++i) {
            read_u_hat(s, i);
            work(s, i);
        }
        transpose_block(reinterpret_cast<const T*>(s.sum), L, R_, B_, partial, R_);
    }

    // dots [J, count] = û · state for `count` slots that are `stride` apart.
    CAPSOPS_INLINE void products(const Scratch& s, int64_t slot, int64_t stride, int64_t count) const {
        for (int64_t j = 0; j < J_; ++j) {
            for (int64_t n = 0; n < count; ++n) {
                const Lanes<T>*x = state(slot + n * stride) + j * D_, *u_hat = s.u_hat + j * D_;
                Lanes<T> even = Lanes<T>::filled(0), odd = even;
                int64_t d = 0;
                for (; d + 2 <= D_; d += 2) {
                    add_product(even, u_hat[d], x[d]);
                    add_product(odd, u_hat[d + 1], x[d + 1]);
                }
                if (d < D_) add_product(even, u_hat[d], x[d]);
                s.dots[j * count + n] = even + odd;
            }
        }
    }

    // sum [R] += c û for c whose numbers are `stride` apart.
    CAPSOPS_INLINE void add_scaled(const Scratch& s, const Lanes<T>* c, int64_t stride) const {
        for (int64_t j = 0; j < J_; ++j) {
            const Lanes<T> c_j = c[j * stride];
            for (int64_t r = j * D_; r < (j + 1) * D_; ++r) add_product(s.sum[r], c_j, s.u_hat[r]);
        }
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
