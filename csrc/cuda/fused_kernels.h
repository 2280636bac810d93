// Selects the instances of the fused kernels. There is one source file for each kind of multiplication, so
// that they compile in parallel.
#pragma once

#include "fused_gradients.h"
#include "precomputed_passes.h"

namespace capsops {

template <typename Math, int M, int N>
FusedKernels fused_kernels_of(bool backward, int logits) {
    FusedKernels kernels{};
    if constexpr (Math::precomputed) {
        kernels.passes = backward ? precomputed_passes_kernel<typename Math::S, M, N, true>
                                  : precomputed_passes_kernel<typename Math::S, M, N, false>;
    }
    if constexpr (N < 4) {
        constexpr int gradient_m = N == 2 ? 1 : 2;
        kernels.gradients =
            logits > 2 ? gradients_kernel<Math, gradient_m, N, 4> : gradients_kernel<Math, 2, N, 2>;
    } else {
        kernels.gradients = gradients_kernel<Math, 1, N, 2>;
    }
    return kernels;
}

template <typename Math>
FusedKernels fused_kernels(const Tiling& tiling, bool backward, int logits) {
    switch (tiling.n) {
        case 1:
            return fused_kernels_of<Math, 2, 1>(backward, logits);
        case 2:
            return fused_kernels_of<Math, 2, 2>(backward, logits);
        default:
            return fused_kernels_of<Math, 1, 4>(backward, logits);
    }
}

}  // namespace capsops
