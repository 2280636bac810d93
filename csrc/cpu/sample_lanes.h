// Couplings of one input capsule for a lane group: samples of the batch in the lanes of SIMD registers.
#pragma once

#include "softmax.h"
#include "starting_logits.h"
#include "threading.h"
#include "transpose.h"

namespace capsops {
namespace CAPSOPS_ISA {

template <typename T>
class SampleLanes {
    static constexpr int L = lane_group<T>;
    const RoutingCall& call_;
    const int64_t J_;
    T* rows_;          // starting logits of one i, or their gradient [L, J]
    Lanes<T>* start_;  // [J]

  public:
    SampleLanes(const RoutingCall& call, Arena& arena)
        : call_(call),
          J_(call.J),
          rows_(arena.take<T>(call.logits.data ? L * J_ : 0)),
          start_(arena.take<Lanes<T>>(call.logits.data ? J_ : 0)) {}

    // Turns logits û · V of `terms` passes, dots[j * stride + t], into couplings. b is the first sample.
    CAPSOPS_INLINE void couple(int64_t b, int64_t i, Lanes<T>* dots, int64_t terms, int64_t stride) const {
        if (call_.logits.data) {
            read_start(b, i);
            if (call_.iterations == 0) return open_pairs(start_, dots, J_, stride);
            for (int64_t j = 0; j < J_; ++j) {
                for (int64_t t = 0; t < terms; ++t) dots[j * stride + t] += start_[j];
            }
        }
        for (int64_t t = 0; t < terms; ++t)
            softmax(dots + t, J_, stride, call_.leaky, call_.logits.data != nullptr);
    }

    // Adds Σ_t ∂b to the gradient of the starting logits, for ∂b that follow the couplings of `terms` passes
    // in dots [J, 2 terms]. The first sample is b in this call, and first + b in the whole call.
    CAPSOPS_NOINLINE void add_gradient(const LogitsGradient<T>& gradient, int rank, int64_t b, int64_t first,
                                       int64_t i, int64_t terms, const Lanes<T>* dots) const {
        for (int64_t j = 0; j < J_; ++j) {
            const Lanes<T>* grad_b = dots + (2 * j + 1) * terms;
            start_[j] = grad_b[0];
            for (int64_t t = 1; t < terms; ++t) start_[j] += grad_b[t];
        }
        if (call_.logits.sizes[0] == 1) {  // a lane without a sample has ∂b = 0
            for (int64_t j = 0; j < J_; ++j) {
                rows_[j] = 0;
                for (const Vec<T>& part : start_[j].part) rows_[j] += sum<T>(part);
            }
            return gradient.add(rank, 0, i, rows_);
        }
        transpose_block(reinterpret_cast<const T*>(start_), L, J_, L, rows_, J_);
        for (int64_t n = 0; n < smaller(L, call_.B - b); ++n)
            gradient.add(rank, first + b + n, i, rows_ + n * J_);
    }

  private:
    CAPSOPS_NOINLINE void read_start(int64_t b, int64_t i) const {
        if (call_.logits.strides[0] == 0) {
            read_logits(call_, 0, i, rows_);
            for (int64_t j = 0; j < J_; ++j) start_[j] = Lanes<T>::filled(rows_[j]);
            return;
        }
        const int64_t samples = smaller(L, call_.B - b);
        for (int64_t lane = 0; lane < samples; ++lane) read_logits(call_, b + lane, i, rows_ + lane * J_);
        if (samples < L) std::memset(rows_ + samples * J_, 0, (L - samples) * J_ * sizeof(T));
        transpose_block(rows_, J_, L, J_, reinterpret_cast<T*>(start_), L);
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
