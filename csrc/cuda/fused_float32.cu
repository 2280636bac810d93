#include "fused_kernels.h"

namespace capsops {

FusedKernels fused_float32(const Tiling& tiling, bool backward, int logits) {
    return fused_kernels<MultiplyAdds>(tiling, backward, logits);
}

}  // namespace capsops
