#include "pass_kernels.h"

namespace capsops {

PassKernel pass_kernel_backward_float16(const PassTiling& tiling, bool shallow) {
    return pass_kernel_of_16_bit<Float16, true>(tiling, shallow);
}

}  // namespace capsops
