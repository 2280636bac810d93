#include "pass_kernels.h"

namespace capsops {

PassKernel pass_kernel_float32(const PassTiling& tiling) {
    return pass_kernel_of_float32<Float32Products, false>(tiling);
}

}  // namespace capsops
