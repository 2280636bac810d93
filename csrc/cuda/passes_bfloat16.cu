#include "pass_kernels.h"

namespace capsops {

PassKernel pass_kernel_bfloat16(const PassTiling& tiling, bool shallow) {
    return pass_kernel_of_16_bit<Bfloat16, false>(tiling, shallow);
}

}  // namespace capsops
