// Creates call records from the arguments that Python passes, and checks them.
#pragma once

#include <array>
#include <string>

#include "common/calls.h"
#include "common/checks.h"

namespace capsops {

// `last`: the last dtype that the kernels support.
inline Dtype checked_dtype(int dtype, Dtype last) {
    require(dtype >= 0 && dtype <= int(last), "dtype", dtype, ("0 to " + std::to_string(int(last))).c_str());
    return Dtype(dtype);
}

// `grad` may be missing.
inline SquashCall squash_call(const Memory& s, const Memory& grad, const Memory& out, int64_t outer,
                              int64_t n, int64_t inner, Dtype dtype) {
    SquashCall call{};
    call.outer = outer, call.n = n, call.inner = inner, call.dtype = dtype;
    const int64_t element = dtype_size(dtype);
    call.s = pointer("s", s, {outer, n, inner}, element);
    call.grad = optional_pointer("grad", grad, {outer, n, inner}, element);
    call.out = pointer("out", out, {outer, n, inner}, element);
    return call;
}

inline PredictionsCall predictions_call(const Memory& u, const Memory& weight, int64_t B, int64_t I,
                                        int64_t J, int64_t D, int64_t K, Dtype dtype) {
    PredictionsCall call{};
    call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
    call.dtype = call.u_hat_dtype = dtype;
    call.u = pointer("u", u, {B, I, K}, dtype_size(dtype));
    call.weight = pointer("weight", weight, {I, J, D, K}, dtype_size(dtype));
    return call;
}

inline void set_output(PredictionsCall& call, const Memory& u_hat) {
    call.u_hat = pointer("u_hat", u_hat, {call.B, call.I, call.J, call.D}, dtype_size(call.dtype));
}

inline void set_gradients(PredictionsCall& call, const Memory& grad, const Memory& grad_u,
                          const Memory& grad_weight) {
    const int64_t B = call.B, I = call.I, J = call.J, D = call.D, K = call.K;
    const int64_t element = dtype_size(call.dtype);
    call.grad = pointer("grad", grad, {B, I, J, D}, element);
    call.grad_u = optional_pointer("grad_u", grad_u, {B, I, K}, element);
    call.grad_weight = optional_pointer("grad_weight", grad_weight, {I, J, D, K}, element);
}

// The options of a call of routing; set_tensors() adds the tensors.
inline RoutingCall routing_call(int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int64_t iterations,
                                bool leaky, bool detach, bool squash_output, Dtype dtype) {
    require(iterations >= 0 && iterations <= max_iterations, "iterations", iterations, "0 to 1000");
    RoutingCall call{};
    call.B = B, call.I = I, call.J = J, call.D = D, call.K = K, call.iterations = iterations;
    call.leaky = leaky, call.detach = detach, call.squash_output = squash_output;
    call.dtype = call.u_hat_dtype = dtype;
    return call;
}

// The tensors of a call of routing as Python passes them. Those that an op does not use may be missing.
struct RoutingTensors {
    Memory u, weight, bias, s, v, couplings, grad, grad_u, grad_weight, grad_bias;
};

// Adds starting logits to a call. `logits` is the memory from their first number to the end of its block.
inline void set_logits(RoutingCall& call, const Memory& logits, const std::array<int64_t, 3>& sizes,
                       const std::array<int64_t, 3>& strides, const Memory& grad_logits) {
    if (logits.first == 0 && logits.second == 0) {
        if (grad_logits.first) throw std::invalid_argument("grad_logits: got one without logits");
        return;
    }
    const int64_t wanted[3] = {call.B, call.I, call.J}, element = dtype_size(call.dtype);
    int64_t last = 0;  // the offset of the last number
    for (int axis = 0; axis < 3; ++axis) {
        require(sizes[axis] == 1 || sizes[axis] == wanted[axis], "logits", sizes[axis],
                "an axis as long as that of the capsules, or 1");
        int64_t span;
        const bool fits = strides[axis] >= 0 &&
                          !__builtin_mul_overflow(strides[axis], sizes[axis] - 1, &span) &&
                          !__builtin_add_overflow(last, span, &last);
        require(fits, "logits", strides[axis], "strides of 0 or more that stay within its memory");
        call.logits.sizes[axis] = sizes[axis];
        call.logits.strides[axis] = sizes[axis] == 1 ? 0 : strides[axis];
    }
    require(logits.first != 0 && last < logits.second / element, "logits", logits.second,
            "as many bytes as its sizes and strides span");
    call.logits.data = reinterpret_cast<const void*>(logits.first);
    call.grad_logits = optional_pointer("grad_logits", grad_logits, {sizes[0], sizes[1], sizes[2]}, element);
}

inline void set_tensors(RoutingCall& call, const RoutingTensors& tensors) {
    const int64_t B = call.B, I = call.I, J = call.J, D = call.D, K = call.K;
    const int64_t passes = call.iterations > 1 ? call.iterations : 1;
    const int64_t element = dtype_size(call.dtype);
    const int64_t matrices = call.shared ? 1 : I;   // for each output capsule
    const int64_t predicted = call.shared ? 1 : J;  // precomputed predictions of an input capsule
    call.weight = optional_pointer("weight", tensors.weight, {matrices, J, D, K}, element);
    call.u = call.weight ? pointer("u", tensors.u, {B, I, K}, element)
                         : pointer("u", tensors.u, {B, I, predicted, D}, element);
    call.bias = optional_pointer("bias", tensors.bias, {J, D}, element);
    call.s = optional_pointer("s", tensors.s, {passes, B, J, D}, sum_size(call.dtype));
    call.v = optional_pointer("v", tensors.v, {B, J, D}, element);
    call.couplings = optional_pointer("couplings", tensors.couplings, {B, I, J}, element);
    call.grad = optional_pointer("grad", tensors.grad, {B, J, D}, element);
    call.grad_u = call.weight ? optional_pointer("grad_u", tensors.grad_u, {B, I, K}, element)
                              : optional_pointer("grad_u", tensors.grad_u, {B, I, predicted, D}, element);
    call.grad_weight = optional_pointer("grad_weight", tensors.grad_weight, {matrices, J, D, K}, element);
    call.grad_bias = optional_pointer("grad_bias", tensors.grad_bias, {J, D}, element);
    if (!call.weight && call.grad_weight) throw std::invalid_argument("grad_weight: got one without weight");
}

inline void set_mask(RoutingCall& call, const Memory& mask) {
    call.mask = static_cast<const uint8_t*>(optional_pointer("mask", mask, {call.B, call.I}, 1));
}

// Raises an error if a tensor that the op reads or writes is missing.
inline void require_tensors(RoutingOp op, const RoutingCall& call) {
    require_tensor("u", call.u);
    switch (op) {
        case RoutingOp::forward:
            require_tensor("s", call.s);
            require_tensor("v", call.v);
            return;
        case RoutingOp::backward:
            require_tensor("s", call.s);
            require_tensor("grad", call.grad);
            if (!call.weight) require_tensor("grad_u", call.grad_u);
            require_tensor("grad_bias", call.grad_bias);
            return;
        case RoutingOp::couplings:
            require_tensor("weight", call.weight);
            require_tensor("couplings", call.couplings);
            return;
    }
}

}  // namespace capsops
