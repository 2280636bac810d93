#include "fused_kernels.h"

namespace capsops {

FusedKernels fused_bfloat16(const Tiling& tiling, bool backward, int logits) {
    return fused_kernels<SixteenBit<Bfloat16>>(tiling, backward, logits);
}

}  // namespace capsops
