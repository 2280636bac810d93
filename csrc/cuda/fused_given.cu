#include "fused_kernels.h"

namespace capsops {

FusedKernels fused_given(Storage storage, const Tiling& tiling, bool backward, int logits) {
    FusedKernels kernels{};
    with_storage(storage, [&](auto type) {
        kernels = fused_kernels<GivenPredictions<decltype(type)>>(tiling, backward, logits);
    });
    return kernels;
}

}  // namespace capsops
