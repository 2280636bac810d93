#include "fused_kernels.h"

namespace capsops {

FusedKernels fused_float16(const Tiling& tiling, bool backward, int logits) {
    return fused_kernels<SixteenBit<Float16>>(tiling, backward, logits);
}

}  // namespace capsops
