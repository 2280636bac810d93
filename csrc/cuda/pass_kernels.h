// Selects the instances of the passes. There is one source file for each kind of numbers and each direction,
// so that they compile in parallel.
#pragma once

#include "passes.h"

namespace capsops {

// With `any_steps` the kernels take any number of steps in K, else one.
template <typename Math, bool any_steps, bool backward>
PassKernel pass_kernel(const PassTiling& tiling) {
    switch (tiling.n) {
        case 1:
            return passes_kernel<Math, Groups<1>, !any_steps, backward>;
        case 2:
            return tiling.few ? passes_kernel<Math, Groups<2, true>, !any_steps, backward>
                              : passes_kernel<Math, Groups<2>, !any_steps, backward>;
        default:
            return passes_kernel<Math, Groups<4>, !any_steps, backward>;
    }
}

// For float32: one step where it is common, 16 components of an output capsule and 8 of an input capsule.
template <typename Math, bool backward>
PassKernel pass_kernel_of_float32(const PassTiling& tiling) {
    if (tiling.n != 2 || tiling.steps > 1) return pass_kernel<Math, true, backward>(tiling);
    return tiling.few ? passes_kernel<Math, Groups<2, true>, true, backward>
                      : passes_kernel<Math, Groups<2>, true, backward>;
}

template <typename S, bool backward>
PassKernel pass_kernel_of_16_bit(const PassTiling& tiling, bool shallow) {
    return shallow ? pass_kernel<ShallowSixteenBitProducts<S>, false, backward>(tiling)
                   : pass_kernel<SixteenBitProducts<S>, true, backward>(tiling);
}

}  // namespace capsops
