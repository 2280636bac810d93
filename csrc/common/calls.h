// The call records, which describe a call of an op to the kernels for CPU and CUDA. All tensors are
// contiguous.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace capsops {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

CAPSOPS_HOST_DEVICE int64_t dtype_size(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Bytes of a number in the dtype of sums, which is float64 for float64 and else float32.
CAPSOPS_HOST_DEVICE int64_t sum_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// Vectors of n numbers, `inner` apart, in tensors [outer, n, inner].
struct SquashCall {
    const void* s;
    const void* grad;  // backward only
    void* out;
    int64_t outer, n, inner;
    Dtype dtype;
};

// u_hat_ij = W_ij u_i: u [B, I, K], weight [I, J, D, K], u_hat [B, I, J, D].
struct PredictionsCall {
    const void* u;
    const void* weight;
    const void* grad;   // backward only
    void* u_hat;        // forward only
    void* grad_u;       // backward only; null where it is not needed
    void* grad_weight;  // backward only; null where it is not needed
    int64_t B, I, J, D, K;
    Dtype dtype;
    Dtype u_hat_dtype;  // of u_hat and grad: that of the other tensors, or that of sums
};

enum class RoutingOp : int { forward = 0, backward = 1, couplings = 2 };

// Where the routing logits start: numbers that are broadcast to [B, I, J].
struct StartingLogits {
    const void* data;    // null where there are none: they start at 0
    int64_t sizes[3];    // of the axes of B, I and J: as long as those, or 1
    int64_t strides[3];  // in numbers; 0 where an axis is broadcast
};

// Routing on u [B, I, K] and weight [I, J, D, K] or, where weight is null, on precomputed predictions: u is
// then u_hat [B, I, J, D]. If `shared`, weight is [J, D, K], the same for all input capsules, and u_hat is
// [B, I, D], the same for all output capsules.
struct RoutingCall {
    const void* u;
    const void* weight;
    const void* bias;  // forward and couplings: [J, D] or null
    StartingLogits logits;
    const uint8_t* mask;  // [B, I], 0 where an input capsule is not there; or null
    void* s;            // [max(iterations, 1), B, J, D] in the dtype of sums: written forward, read backward
    void* v;            // forward: [B, J, D]
    void* couplings;    // couplings: [B, I, J]
    const void* grad;   // backward: [B, J, D]
    void* grad_u;       // backward; null where it is not needed
    void* grad_weight;  // backward; null where it is not needed
    void* grad_bias;    // backward: [J, D]
    void* grad_logits;  // backward: of the sizes of logits; null where it is not needed
    int64_t B, I, J, D, K;
    int64_t iterations;
    bool shared, leaky, detach;
    bool squash_output;  // whether v is squash(s) of the last pass, else s itself
    Dtype dtype;
    Dtype u_hat_dtype;  // of precomputed predictions and their gradient: dtype, or that of sums
};

}  // namespace capsops
