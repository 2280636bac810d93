// The starting logits of a call and their gradient, and its mask.
#pragma once

#include "dtype_convert.h"
#include "threading.h"

namespace capsops {
namespace CAPSOPS_ISA {

// Whether an input capsule takes part.
CAPSOPS_INLINE bool is_present(const RoutingCall& call, int64_t b, int64_t i) {
    return !call.mask || call.mask[b * call.I + i];
}

// Sets the rows [count, length] of absent input capsules to 0, the first of which is i of sample b.
template <typename T>
CAPSOPS_INLINE void clear_absent(const RoutingCall& call, int64_t b, int64_t i, int64_t count, int64_t length,
                                 T* rows) {
    for (int64_t n = 0; call.mask && n < count; ++n) {
        if (!is_present(call, b, i + n)) std::memset(rows + n * length, 0, length * sizeof(T));
    }
}

// row [J] = the starting logits of one input capsule.
template <typename T>
inline void read_logits(const RoutingCall& call, int64_t b, int64_t i, T* row) {
    const StartingLogits& logits = call.logits;
    const int64_t at = b * logits.strides[0] + i * logits.strides[1], step = logits.strides[2];
    if (step == 1) return read_row(logits.data, call.dtype, at, call.J, row);
    for (int64_t j = 0; j < call.J; ++j) read_row(logits.data, call.dtype, at + j * step, 1, row + j);
}

// rows [count, J] = the starting logits of `count` input capsules.
template <typename T>
inline void read_logits(const RoutingCall& call, int64_t b, int64_t i, int64_t count, T* rows) {
    const StartingLogits& logits = call.logits;
    if (logits.strides[1] == call.J && logits.strides[2] == 1) {
        const int64_t at = b * logits.strides[0] + i * call.J;
        return read_row(logits.data, call.dtype, at, count * call.J, rows);
    }
    for (int64_t n = 0; n < count; ++n) read_logits(call, b, i + n, rows + n * call.J);
}

// Sums of the gradient of the starting logits, whose rows [J] the threads add in any order of input capsules.
// Where the logits have axes for samples and for input capsules, a row is a result as it is. Otherwise the
// sums are in double precision: they may have as many terms as there are samples and input capsules. Each
// thread has sums of its own, unless every sum belongs to an input capsule and every input capsule to one
// thread.
template <typename T>
class LogitsGradient {
    const RoutingCall& call_;
    const bool summed_;    // over samples or input capsules
    const int64_t width_;  // J, or 1 if it is summed over j
    const int64_t numbers_;
    int copies_ = 0;
    double* sums_ = nullptr;  // [copies, numbers]
    T* total_ = nullptr;      // [numbers]

  public:
    explicit LogitsGradient(const RoutingCall& call)
        : call_(call),
          summed_(call.logits.sizes[0] < call.B || call.logits.sizes[1] < call.I),
          width_(call.logits.sizes[2]),
          numbers_(call.logits.sizes[0] * call.logits.sizes[1] * width_) {}

    bool needed() const { return call_.grad_logits != nullptr; }
    int64_t numbers() const { return numbers_; }

    // `threads_own_inputs`: all rows of an input capsule are added by one thread.
    void plan(Arena& arena, int threads, bool threads_own_inputs) {
        if (!needed() || !summed_) return;
        copies_ = threads_own_inputs && call_.logits.sizes[1] == call_.I ? 1 : threads;
        sums_ = arena.take<double>(numbers_ * copies_);
        total_ = arena.take<T>(numbers_);
    }

    // Sets all sums to 0.
    void clear() const {
        if (copies_ > 0) std::memset(sums_, 0, numbers_ * copies_ * sizeof(double));
    }

    // Adds the gradient of the logits of one input capsule [J], which it may change.
    void add(int rank, int64_t b, int64_t i, T* row) const {
        for (int64_t j = 1; width_ < call_.J && j < call_.J; ++j) row[0] += row[j];
        const int64_t own_b = call_.logits.sizes[0] == 1 ? 0 : b, own_i = call_.logits.sizes[1] == 1 ? 0 : i;
        const int64_t at = (own_b * call_.logits.sizes[1] + own_i) * width_;
        if (!summed_) return write_row(call_.grad_logits, call_.dtype, at, width_, row);
        double* sums = sums_ + (copies_ == 1 ? 0 : rank * numbers_) + at;
        for (int64_t j = 0; j < width_; ++j) sums[j] += row[j];
    }

    // Writes the sums when all threads have added theirs.
    void finish() const {
        if (!needed() || !summed_) return;
        for (int copy = 1; copy < copies_; ++copy) {
            for (int64_t at = 0; at < numbers_; ++at) sums_[at] += sums_[copy * numbers_ + at];
        }
        for (int64_t at = 0; at < numbers_; ++at) total_[at] = T(sums_[at]);
        write_row(call_.grad_logits, call_.dtype, 0, numbers_, total_);
    }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
