// What the kernels offer to the bindings, and how a call is described to them. Tensors are contiguous.
#pragma once

#include <cstdint>

#include "device.h"

namespace capsops {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Vectors of n numbers that lie `inner` apart, in [outer, n, inner].
struct SquashCall {
    const void* s;
    const void* grad;  // backward only
    void* out;
    int64_t outer, n, inner;
    Dtype dtype;
};

// u_hat_ij = W_ij u_i: u [B, I, K], weight [I, J, D, K].
struct PredictionsCall {
    const void* u;
    const void* weight;
    const void* grad;   // backward only
    void* u_hat;        // forward only
    void* grad_u;       // backward only; null where it is not needed
    void* grad_weight;  // backward only; null where it is not needed
    int64_t B, I, J, D, K;
    Dtype dtype;
};

// Routing, on u and weight or (weight null) on given predictions u = u_hat [B, I, J, D].
struct RoutingCall {
    const void* u;
    const void* weight;
    const void* bias;   // [J, D] or null
    float* s;           // [max(iterations, 1), B, J, D]: written forward, read backward
    void* v;            // forward: [B, J, D]
    void* couplings;    // couplings: [B, I, J]
    const void* grad;   // backward: [B, J, D]
    void* grad_u;       // backward; null where it is not needed
    void* grad_weight;  // backward; null where it is not needed
    void* grad_bias;    // backward: [J, D]
    void* workspace;    // of routing_workspace(...) bytes
    int64_t B, I, J, D, K;
    int64_t iterations;
    bool leaky, detach;
    Dtype dtype;
    bool tf32;         // float32 products may be rounded to TF32
    bool cooperative;  // one launch for all passes where the device can; else one launch for each step
};

void squash(const SquashCall& call, Stream stream);
void squash_backward(const SquashCall& call, Stream stream);
void predictions(const PredictionsCall& call, const Device& device, Stream stream);
void predictions_backward(const PredictionsCall& call, const Device& device, Stream stream);

enum class RoutingOp : int { forward = 0, backward = 1, couplings = 2 };

// Bytes of workspace that the call takes; its pointers are not looked at, but for what is null.
int64_t routing_workspace(RoutingOp op, const RoutingCall& call, const Device& device);
void routing(RoutingOp op, const RoutingCall& call, const Device& device, Stream stream);

#if defined(__CUDACC__) || defined(CAPSOPS_EMULATED)
// Calls function(T()) with the type that the dtype stands for.
template <typename Function>
void with_dtype(Dtype dtype, Function function) {
    switch (dtype) {
        case Dtype::float32:
            return function(float());
        case Dtype::bfloat16:
            return function(Bfloat16());
        case Dtype::float16:
            return function(Float16());
    }
}
#endif

CAPSOPS_SHARED int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many blocks as there is work for, within what a launch takes; kernels loop over the rest.
inline int64_t blocks_for(int64_t work, int64_t work_of_block) {
    const int64_t blocks = divide_up(work, work_of_block), most = int64_t(1) << 20;
    return blocks < 1 ? 1 : blocks < most ? blocks : most;
}

}  // namespace capsops
