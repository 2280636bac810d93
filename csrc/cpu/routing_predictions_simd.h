// Passes over precomputed predictions.
//
// The numbers of û_ij lie in the lanes of registers, and are multiplied by V_j there. The sums over these
// lanes are made for a register full of input capsules at once, so that the softmax over j is element-wise.
// For the same reason û of a block of input capsules is read twice in a pass, from memory and from the cache.
//
// Every other pass goes through the input capsules backwards, so that it begins with what the previous pass
// left in the cache.
#pragma once

#include "dtype_convert.h"
#include "input_lanes.h"
#include "threading.h"

namespace capsops {
namespace CAPSOPS_ISA {

// N: lanes of a register, and input capsules of a block.
template <typename T, int N>
class PredictionsSimdEngine {
    const RoutingCall& call_;
    const int64_t B_, I_, J_, D_;
    const int64_t padded_;  // D rounded up to whole registers
    const int64_t row_;     // J · padded
    const int64_t slots_;
    const bool direct_;  // û is read and written as it is in memory
    T* states_;          // [slots, B, row]
    char* pool_ = nullptr;
    int64_t pool_stride_ = 0;

    struct Scratch {
        T* u_hat;  // of a block, converted or padded if need be; then ∂û [N, row]
        T* dots;   // logits, then couplings [slots, J, N]
        T* sum;    // [row]
        InputLanes<T, N> lanes;

        Scratch(Arena& arena, const PredictionsSimdEngine& engine)
            : u_hat(arena.take<T>(N * engine.row_)),
              dots(arena.take<T>(larger(engine.slots_, 2) * engine.J_ * N)),
              sum(arena.take<T>(engine.row_)),
              lanes(engine.call_, N, arena) {}
    };

    Scratch scratch_of(const Team& team) const {
        Arena own(pool_ + pool_stride_ * team.rank);
        return Scratch(own, *this);
    }

  public:
    // The sum over i is split into so many parts, so that every thread has work.
    int64_t splits = 1;
    static constexpr bool threads_own_inputs = false;  // in the gradient pass
    const LogitsGradient<T>* grad_logits = nullptr;    // null where it is not needed
    int64_t first_sample = 0;                          // number of the first sample in the whole call
    int first_rank = 0;                                // likewise of the thread

    PredictionsSimdEngine(const RoutingCall& call, int64_t slots, int threads)
        : call_(call),
          B_(call.B),
          I_(call.I),
          J_(call.J),
          D_(call.D),
          padded_(round_up(D_, N)),
          row_(J_ * padded_),
          slots_(slots),
          direct_(is_native<T>(call.u_hat_dtype) && padded_ == D_),
          states_(nullptr) {
        splits = smaller(threads, divide_up(I_, N));
    }

    void plan(Arena& arena, int threads, bool) {
        states_ = arena.take<T>(slots_ * B_ * row_);
        Arena measure;
        Scratch(measure, *this);
        pool_stride_ = measure.used();
        pool_ = arena.take<char>(pool_stride_ * threads);
    }

    // Copies a state [B, J, D] (V or ∂s of a pass) to a slot.
    void prepare(const Team& team, int64_t slot, const T* state) {
        for (int64_t n = team.begin(B_ * J_); n < team.end(B_ * J_); ++n) {
            T* padded = states_ + (slot * B_ * J_ + n) * padded_;
            std::memcpy(padded, state + n * D_, D_ * sizeof(T));
            for (int64_t p = D_; p < padded_; ++p) padded[p] = 0;
        }
    }

    // partial [splits, B, J, D] = Σ_i û; every other pass goes through i backwards
    CAPSOPS_NOINLINE void sum_uniform(const Team& team, int64_t pass, T* partial) {
        sum_over_i(team, pass, partial,
                   [&](const Scratch& s, int64_t, int64_t, int64_t count, const T* u_hat) {
                       for (int64_t p = 0; p < row_; p += N) {
                           Vec<T, N> total = Vec<T, N>{};
                           for (int64_t n = 0; n < count; ++n) total += load<T, N>(u_hat + n * row_ + p);
                           store<T, N>(s.sum + p, load<T, N>(s.sum + p) + total);
                       }
                   });
    }

    // partial = Σ_i c û with the couplings of the state in slot `v`
    CAPSOPS_NOINLINE void sum_routed(const Team& team, int64_t pass, int64_t v, T* partial) {
        sum_over_i(team, pass, partial,
                   [&](const Scratch& s, int64_t b, int64_t i, int64_t count, const T* u_hat) {
                       products(u_hat, count, state(v, b), s.dots);
                       s.lanes.couple(b, i, count, 1, s.dots);
                       add_scaled(s.dots, u_hat, count, s.sum);
                   });
    }

    // partial = Σ_i ∂b û with V in slot `v` and ∂s in slot `ds`
    CAPSOPS_NOINLINE void sum_agreement(const Team& team, int64_t pass, int64_t v, int64_t ds, T* partial) {
        sum_over_i(team, pass, partial,
                   [&](const Scratch& s, int64_t b, int64_t i, int64_t count, const T* u_hat) {
                       T* grad_b = s.dots + J_ * N;
                       products(u_hat, count, state(v, b), s.dots);
                       products(u_hat, count, state(ds, b), grad_b);
                       s.lanes.couple(b, i, count, 1, s.dots);
                       s.lanes.softmax_vjp(s.dots, grad_b);
                       add_scaled(grad_b, u_hat, count, s.sum);
                   });
    }

    // Computes ∂û. The slots are V of `terms` passes, then their ∂s, then, with `uniform`, the scaled ∂s of
    // the first pass. `agreement`: whether the gradient flows through the logits too.
    CAPSOPS_NOINLINE void gradient(const Team& team, int64_t terms, bool uniform, bool agreement) {
        const Scratch s = scratch_of(team);
        const bool needs_b = agreement || grad_logits;
        for_blocks(team, s, [&](int64_t b, int64_t i, int64_t count, const T* u_hat) {
            T* grad_b = s.dots + terms * J_ * N;
            for (int64_t t = 0; t < (needs_b ? 2 : 1) * terms; ++t)
                products(u_hat, count, state(t, b), s.dots + t * J_ * N);
            s.lanes.couple(b, i, count, terms, s.dots);
            for (int64_t t = 0; needs_b && t < terms; ++t)
                s.lanes.softmax_vjp(s.dots + t * J_ * N, grad_b + t * J_ * N);
            if (grad_logits) {
                s.lanes.add_gradient(*grad_logits, first_rank + team.rank, first_sample + b, i, count, terms,
                                     grad_b);
            }
            T* grad_u_hat = direct_ ? static_cast<T*>(call_.grad_u) + (b * I_ + i) * row_ : s.u_hat;
            for (int64_t j = 0; j < J_; ++j) {
                for (int64_t p = j * padded_; p < (j + 1) * padded_; p += N)
                    gradient_of_u_hat(s, b, j, p, count, terms, uniform, agreement, grad_u_hat);
            }
            write_gradient(b, i, count, grad_u_hat);
        });
    }

    // Writes the couplings of the state in slot `v` to call.couplings.
    CAPSOPS_NOINLINE void couplings(const Team& team, int64_t v) {
        const Scratch s = scratch_of(team);
        for_blocks(team, s, [&](int64_t b, int64_t i, int64_t count, const T* u_hat) {
            products(u_hat, count, state(v, b), s.dots);
            s.lanes.couple(b, i, count, 1, s.dots);
            s.lanes.write(b, i, count, s.dots);
        });
    }

  private:
    const T* state(int64_t slot, int64_t b) const { return states_ + (slot * B_ + b) * row_; }

    // û of a block [count, row], padded to whole registers, 0 for absent input capsules.
    const T* read_block(const Scratch& s, int64_t b, int64_t i, int64_t count) const {
        const int64_t at = (b * I_ + i) * J_ * D_;
        if (direct_ && !call_.mask) return static_cast<const T*>(call_.u) + at;
        if (padded_ == D_) {
            read_row(call_.u, call_.u_hat_dtype, at, count * row_, s.u_hat);
        } else {
            for (int64_t r = 0; r < count * J_; ++r) {
                read_row(call_.u, call_.u_hat_dtype, at + r * D_, D_, s.u_hat + r * padded_);
                for (int64_t p = D_; p < padded_; ++p) s.u_hat[r * padded_ + p] = 0;
            }
        }
        clear_absent(call_, b, i, count, row_, s.u_hat);
        return s.u_hat;
    }

    // Calls work(sample, first input capsule, their number, û) for this thread's share of all blocks, which
    // are of the same input capsules as its shares in other passes.
    template <typename Work>
    void for_blocks(const Team& team, const Scratch& s, const Work& work) const {
        const int64_t blocks = divide_up(I_, N);
        for (int64_t item = team.begin(B_ * blocks); item < team.end(B_ * blocks); ++item) {
            const int64_t b = item % B_, i = item / B_ * N, count = smaller(N, I_ - i);
            work(b, i, count, read_block(s, b, i, count));
        }
    }

    // Calls work(scratch, sample, first input capsule, their number, û) for the blocks of this thread's share
    // of all pairs (sample, split). Writes the sums to partial [splits, B, J, D].
    template <typename Work>
    void sum_over_i(const Team& team, int64_t pass, T* partial, const Work& work) const {
        const Scratch s = scratch_of(team);
        const bool backwards = pass & 1;
        for (int64_t task = team.begin(splits * B_); task < team.end(splits * B_); ++task) {
            const int64_t split = task / B_, b = task % B_;
            const int64_t begin = I_ * split / splits, end = I_ * (split + 1) / splits;
            const int64_t blocks = divide_up(end - begin, N);
            std::memset(s.sum, 0, row_ * sizeof(T));
            for (int64_t n = 0; n < blocks; ++n) {
                const int64_t i = begin + (backwards ? blocks - 1 - n : n) * N, count = smaller(N, end - i);
                work(s, b, i, count, read_block(s, b, i, count));
            }
            T* out = partial + (split * B_ + b) * J_ * D_;
            for (int64_t j = 0; j < J_; ++j) std::memcpy(out + j * D_, s.sum + j * padded_, D_ * sizeof(T));
        }
    }

    // dots [J, N] = û · x for û [count, row]; 0 in lanes without an input capsule
    CAPSOPS_NOINLINE void products(const T* u_hat, int64_t count, const T* x, T* dots) const {
        if (count == N && padded_ == N) return products_of_rows<1>(u_hat, x, dots);
        if (count == N && padded_ == 2 * N) return products_of_rows<2>(u_hat, x, dots);
        for (int64_t j = 0; j < J_; ++j) {
            const T *rows = u_hat + j * padded_, *x_j = x + j * padded_;
            Vec<T, N> total[N];
            for (int64_t n = 0; n < N; ++n) {
                total[n] = Vec<T, N>{};
                for (int64_t p = 0; n < count && p < padded_; p += N)
                    total[n] += load<T, N>(rows + n * row_ + p) * load<T, N>(x_j + p);
            }
            store<T, N>(dots + j * N, sum_lanes<N>(total));
        }
    }

    // The same for N rows of as many registers.
    template <int Registers>
    CAPSOPS_INLINE void products_of_rows(const T* u_hat, const T* x, T* dots) const {
        for (int64_t j = 0; j < J_; ++j) {
            const T* rows = u_hat + j * padded_;
            Vec<T, N> x_j[Registers], total[N];
            for (int p = 0; p < Registers; ++p) x_j[p] = load<T, N>(x + j * padded_ + p * N);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) {
                total[n] = load<T, N>(rows + n * row_) * x_j[0];
                for (int p = 1; p < Registers; ++p) total[n] += load<T, N>(rows + n * row_ + p * N) * x_j[p];
            }
            store<T, N>(dots + j * N, sum_lanes<N>(total));
        }
    }

    // sum [row] += Σ_n c û for c [J, N] and û [count, row]
    CAPSOPS_NOINLINE void add_scaled(const T* c, const T* u_hat, int64_t count, T* sum) const {
        for (int64_t j = 0; j < J_; ++j) {
            for (int64_t p = j * padded_; p < (j + 1) * padded_; p += N) {
                Vec<T, N> even = Vec<T, N>{}, odd = Vec<T, N>{};
                int64_t n = 0;
                for (; n + 2 <= count; n += 2) {
                    even += c[j * N + n] * load<T, N>(u_hat + n * row_ + p);
                    odd += c[j * N + n + 1] * load<T, N>(u_hat + (n + 1) * row_ + p);
                }
                if (n < count) even += c[j * N + n] * load<T, N>(u_hat + n * row_ + p);
                store<T, N>(sum + p, load<T, N>(sum + p) + (even + odd));
            }
        }
    }

    // One register of ∂û_ij for every input capsule of a block: Σ c ∂s and, with `agreement`, Σ ∂b V.
    CAPSOPS_INLINE void gradient_of_u_hat(const Scratch& s, int64_t b, int64_t j, int64_t p, int64_t count,
                                          int64_t terms, bool uniform, bool agreement, T* grad_u_hat) const {
        const Vec<T, N> first = uniform ? load<T, N>(state(2 * terms, b) + p) : Vec<T, N>{};
        const T* c = s.dots + j * N;
        if (terms == 2 && agreement) {  // three iterations without starting logits
            const Vec<T, N> v_0 = load<T, N>(state(0, b) + p), v_1 = load<T, N>(state(1, b) + p);
            const Vec<T, N> grad_s_0 = load<T, N>(state(2, b) + p), grad_s_1 = load<T, N>(state(3, b) + p);
            const int64_t stride = J_ * N;
            for (int64_t n = 0; n < count; ++n) {
                const Vec<T, N> one = first + c[n] * grad_s_0 + c[stride + n] * grad_s_1;
                const Vec<T, N> other = c[2 * stride + n] * v_0 + c[3 * stride + n] * v_1;
                store<T, N>(grad_u_hat + n * row_ + p, one + other);
            }
            return;
        }
        for (int64_t n = 0; n < count; ++n) {
            Vec<T, N> total = first;
            for (int64_t t = 0; t < terms; ++t) {
                total += c[t * J_ * N + n] * load<T, N>(state(terms + t, b) + p);
                if (agreement) total += c[(terms + t) * J_ * N + n] * load<T, N>(state(t, b) + p);
            }
            store<T, N>(grad_u_hat + n * row_ + p, total);
        }
    }

    void write_gradient(int64_t b, int64_t i, int64_t count, T* grad_u_hat) const {
        clear_absent(call_, b, i, count, row_, grad_u_hat);
        if (direct_) return;
        if (padded_ != D_) {
            for (int64_t r = 1; r < count * J_; ++r)
                std::memmove(grad_u_hat + r * D_, grad_u_hat + r * padded_, D_ * sizeof(T));
        }
        write_row(call_.grad_u, call_.u_hat_dtype, (b * I_ + i) * J_ * D_, count * J_ * D_, grad_u_hat);
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
