// Routing by the fused kernels. Without precomputed predictions, u_hat is made anew, tile by tile, in every
// pass.
//
// Host side; the kernels are in fused_passes.h and fused_gradients.h.
#pragma once

#include "plan.h"
#include "routing.h"

namespace capsops {

struct Fused {
    Routing p;
    Tiling tiling;
    bool vectors;               // u and W are copied 16 bytes at a time
    bool couplings;             // the last pass makes couplings
    int first_step, last_step;  // of the sequence of steps that this launch makes
    float* partial_w;           // [splits, I, J, D, K] where the gradient of W comes in splits of the batch
    float* partial_u;           // [tiles_j, B, I, K] where the gradient of u comes in tiles of j
};

// The kernels for one way to multiply, or for precomputed predictions.
struct FusedKernels {
    void (*passes)(Fused);
    void (*gradients)(Fused);
};

// `logits`: how many passes have them.
FusedKernels fused_float32(const Tiling& tiling, bool backward, int logits);
FusedKernels fused_tf32(const Tiling& tiling, bool backward, int logits);
FusedKernels fused_bfloat16(const Tiling& tiling, bool backward, int logits);
FusedKernels fused_float16(const Tiling& tiling, bool backward, int logits);
FusedKernels fused_precomputed(Dtype dtype, const Tiling& tiling, bool backward, int logits);

}  // namespace capsops
