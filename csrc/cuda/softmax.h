// The softmax over the output capsules j of one (b, i), which makes couplings of logits.
//
// Each kernel computes it where it has the logits: passes.h and smem_cached.cu in registers,
// precomputed_passes.h and fused_gradients.h in shared memory (softmax_over_j), routing_general.cu from u_hat
// in memory (softmax_kernel).
#pragma once

#include "device.h"

namespace capsops {

// The coupling c = exp(logit - largest) / sum; mean = sum_j c a, backward only.
struct Softmax {
    float largest, sum, mean;
};

#if defined(__CUDACC__) || defined(CAPSOPS_EMULATED)
CAPSOPS_DEVICE float coupling(const Softmax& softmax, float logit) {
    return expf(logit - softmax.largest) / softmax.sum;
}
#endif

}  // namespace capsops
