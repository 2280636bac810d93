#include "fused_kernels.h"

namespace capsops {

FusedKernels fused_tf32(const Tiling& tiling, bool backward, int logits) {
    return fused_kernels<Tf32>(tiling, backward, logits);
}

}  // namespace capsops
