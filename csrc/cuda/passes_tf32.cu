#include "pass_kernels.h"

namespace capsops {

PassKernel pass_kernel_tf32(const PassTiling& tiling) {
    return pass_kernel_of_float32<Tf32Products, false>(tiling);
}

}  // namespace capsops
