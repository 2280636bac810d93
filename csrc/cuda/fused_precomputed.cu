#include "fused_kernels.h"

namespace capsops {

FusedKernels fused_precomputed(Dtype dtype, const Tiling& tiling, bool backward, int logits) {
    FusedKernels kernels{};
    with_dtype(dtype, [&](auto type) {
        kernels = fused_kernels<PrecomputedPredictions<decltype(type)>>(tiling, backward, logits);
    });
    return kernels;
}

}  // namespace capsops
