#include "fused_kernels.h"

namespace capsops {

FusedKernels fused_given(Storage storage, const Tiling& tiling, bool backward) {
    FusedKernels kernels{};
    with_storage(storage, [&](auto type) {
        kernels = fused_kernels<GivenPredictions<decltype(type)>>(tiling, backward, 0);
    });
    return kernels;
}

}  // namespace capsops
