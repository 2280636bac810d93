// What one instruction set's kernels offer to the bindings, and how a call is described to them.
#pragma once

#include <cstdint>

namespace capsops {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

inline int64_t dtype_size(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Vectors of n numbers that lie `inner` apart, in [outer, n, inner].
struct SquashCall {
    const void* s;
    const void* grad;  // backward only
    void* out;
    int64_t outer, n, inner;
    Dtype dtype;
    int threads;
};

// u_hat_ij = W_ij u_i. Tensors are contiguous: u [B, I, K], weight [I, J, D, K].
struct PredictionsCall {
    const void* u;
    const void* weight;
    const void* grad;   // backward only
    void* u_hat;        // forward only
    void* grad_u;       // backward only; null where it is not needed
    void* grad_weight;  // backward only; null where it is not needed
    int64_t B, I, J, D, K;
    Dtype dtype;
    int threads;
};

// Routing, on u and weight or (weight null) on given predictions u = u_hat [B, I, J, D].
struct RoutingCall {
    const void* u;
    const void* weight;
    const void* bias;  // [J, D] or null
    void* s;  // [max(iterations, 1), B, J, D] in the accumulation type: written forward, read backward
    void* v;  // forward: [B, J, D]
    void* couplings;    // couplings: [B, I, J]
    const void* grad;   // backward: [B, J, D]
    void* grad_u;       // backward; null where it is not needed
    void* grad_weight;  // backward; null where it is not needed
    void* grad_bias;    // backward: [J, D]
    int64_t B, I, J, D, K;
    int64_t iterations;
    bool leaky, detach;
    bool squash_output;  // whether v is squash(s) of the last pass, else s itself
    Dtype dtype;
    int threads;
};

// Every function returns false when it could not allocate its workspace.
struct Kernels {
    const char* name;
    bool (*squash)(const SquashCall&);
    bool (*squash_backward)(const SquashCall&);
    bool (*predictions)(const PredictionsCall&);
    bool (*predictions_backward)(const PredictionsCall&);
    bool (*routing)(const RoutingCall&);
    bool (*routing_backward)(const RoutingCall&);
    bool (*couplings)(const RoutingCall&);
    double (*fma_flops)(double seconds, int threads);  // floating-point operations a second, float32
};

}  // namespace capsops
