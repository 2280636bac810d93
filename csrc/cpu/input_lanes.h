// Couplings of some input capsules of one sample, which lie in the lanes of SIMD registers.
#pragma once

#include "softmax.h"
#include "starting_logits.h"
#include "threading.h"
#include "transpose.h"

namespace capsops {
namespace CAPSOPS_ISA {

// N: lanes of a register. Logits, couplings and their gradients are [J, width]: a row for each output
// capsule, with input capsules in whole registers.
template <typename T, int N>
class InputLanes {
    const RoutingCall& call_;
    const int64_t J_, width_;
    T* start_;  // starting logits, or their gradient [J, width]
    T* pairs_;  // the same, a row for each input capsule [width, J]

  public:
    InputLanes(const RoutingCall& call, int64_t width, Arena& arena)
        : call_(call),
          J_(call.J),
          width_(width),
          start_(arena.take<T>(call.logits.data ? J_ * width : 0)),
          pairs_(arena.take<T>(J_ * width)) {}

    // Turns logits û · V of `terms` passes [terms, J, width] into couplings; without routing they are 1, and
    // 0 for closed pairs. The first `count` lanes have input capsules, the first of which is i of sample b.
    CAPSOPS_NOINLINE void couple(int64_t b, int64_t i, int64_t count, int64_t terms, T* dots) const {
        const bool closable = call_.logits.data != nullptr;
        if (closable) read_start(b, i, count);
        if (closable && call_.iterations == 0) {
            for (int64_t p = 0; p < J_ * width_; ++p) dots[p] = start_[p] == -__builtin_inff() ? T(0) : T(1);
            return;
        }
        for (int64_t t = 0; t < terms; ++t) {
            T* c = dots + t * J_ * width_;
            for (int64_t p = 0; closable && p < J_ * width_; ++p) c[p] += start_[p];
            for (int64_t lane = 0; lane < width_; lane += N) softmax(c + lane, closable);
        }
    }

    // Replaces a by ∂b = c (a − Σ_j c a).
    CAPSOPS_NOINLINE void softmax_vjp(const T* c, T* a) const {
        for (int64_t lane = 0; lane < width_; lane += N) {
            Vec<T, N> mean = Vec<T, N>{};
            for (int64_t p = lane; p < J_ * width_; p += width_)
                mean += load<T, N>(c + p) * load<T, N>(a + p);
            for (int64_t p = lane; p < J_ * width_; p += width_)
                store<T, N>(a + p, load<T, N>(c + p) * (load<T, N>(a + p) - mean));
        }
    }

    // Adds Σ_t ∂b for ∂b [terms, J, width] to the gradient of the starting logits. `b` is the sample's number
    // in the whole call, `rank` that of the thread.
    CAPSOPS_NOINLINE void add_gradient(const LogitsGradient<T>& gradient, int rank, int64_t b, int64_t i,
                                       int64_t count, int64_t terms, const T* grad_b) const {
        std::memcpy(start_, grad_b, J_ * width_ * sizeof(T));
        for (int64_t t = 1; t < terms; ++t) {
            for (int64_t p = 0; p < J_ * width_; ++p) start_[p] += grad_b[t * J_ * width_ + p];
        }
        transpose_block(start_, width_, J_, count, pairs_, J_);
        for (int64_t n = 0; n < count; ++n) gradient.add(rank, b, i + n, pairs_ + n * J_);
    }

    // Writes couplings to call.couplings, 0 for absent input capsules.
    void write(int64_t b, int64_t i, int64_t count, const T* c) const {
        transpose_block(c, width_, J_, count, pairs_, J_);
        clear_absent(call_, b, i, count, J_, pairs_);
        write_row(call_.couplings, call_.dtype, (b * call_.I + i) * J_, count * J_, pairs_);
    }

  private:
    // Lanes without an input capsule get 0.
    void read_start(int64_t b, int64_t i, int64_t count) const {
        read_logits(call_, b, i, count, pairs_);
        std::memset(pairs_ + count * J_, 0, (width_ - count) * J_ * sizeof(T));
        transpose_block(pairs_, J_, width_, J_, start_, width_);
    }

    // Softmax over j of one register of input capsules.
    CAPSOPS_INLINE void softmax(T* c, bool closable) const {
        const Vec<T, N> zero = Vec<T, N>{};
        Vec<T, N> top = call_.leaky ? zero : load<T, N>(c);
        for (int64_t j = 0; j < J_; ++j) top = maximum(top, load<T, N>(c + j * width_));
        if (closable) top = largest_of_closable(top);
        Vec<T, N> total = call_.leaky ? exp_nonpositive<N>(zero - top, T()) : zero;
        for (int64_t j = 0; j < J_; ++j) {
            const Vec<T, N> e = exp_nonpositive<N>(load<T, N>(c + j * width_) - top, T());
            store<T, N>(c + j * width_, e);
            total += e;
        }
        if (closable) total = sum_of_closable(total);
        const Vec<T, N> scale = (zero + 1) / total;
        for (int64_t j = 0; j < J_; ++j) store<T, N>(c + j * width_, load<T, N>(c + j * width_) * scale);
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
