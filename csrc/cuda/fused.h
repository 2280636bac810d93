// Host side of the passes over precomputed predictions (precomputed_passes.h) and of the gradients
// (fused_gradients.h), which compute u_hat again unless it is precomputed.
#pragma once

#include "plan.h"
#include "routing.h"

namespace capsops {

struct Fused {
    Routing p;
    Tiling tiling;
    bool vectors;               // u and W (or u_hat) are copied 16 bytes at a time
    bool couplings;             // the last pass writes the couplings
    int first_step, last_step;  // the steps of the sequence that this launch runs
    float* partial_w;           // [splits, I, J, D, K]: dW for each split of the batch, if there are several
    float* partial_u;           // [tiles_j, B, I, K]: du for each tile of j, if there are several
};

// The kernels for one kind of multiplication or for precomputed predictions.
struct FusedKernels {
    void (*passes)(Fused);  // null unless the predictions are precomputed
    void (*gradients)(Fused);
};

// `logits`: how many passes have logits.
FusedKernels fused_float32(const Tiling& tiling, bool backward, int logits);
FusedKernels fused_tf32(const Tiling& tiling, bool backward, int logits);
FusedKernels fused_bfloat16(const Tiling& tiling, bool backward, int logits);
FusedKernels fused_float16(const Tiling& tiling, bool backward, int logits);
FusedKernels fused_precomputed(Dtype dtype, const Tiling& tiling, bool backward, int logits);

}  // namespace capsops
