// Host side of the passes, whose kernels are in passes.h.
#pragma once

#include "plan.h"
#include "routing.h"

namespace capsops {

struct Passes {
    Routing p;
    PassTiling tiling;
    uint32_t* u;                // the arranged operands: [I, tiles_b m_tiles, steps, u_words, 32], and
    uint32_t* weight;           // [I, tiles_j, steps, units, w_quads, 32, 4]
    Softmax* tile_softmax;      // [tiles_j, I, B], where j is in tiles
    bool couplings;             // the last pass writes the couplings
    bool prepares;              // the first step arranges the operands
    int first_step, last_step;  // the steps of the sequence that this launch runs
};

typedef void (*PassKernel)(Passes);
PassKernel pass_kernel_float32(const PassTiling& tiling);
PassKernel pass_kernel_tf32(const PassTiling& tiling);
PassKernel pass_kernel_backward_float32(const PassTiling& tiling);
PassKernel pass_kernel_backward_tf32(const PassTiling& tiling);
// `shallow`: K is at most 8.
PassKernel pass_kernel_bfloat16(const PassTiling& tiling, bool shallow);
PassKernel pass_kernel_float16(const PassTiling& tiling, bool shallow);
PassKernel pass_kernel_backward_bfloat16(const PassTiling& tiling, bool shallow);
PassKernel pass_kernel_backward_float16(const PassTiling& tiling, bool shallow);

}  // namespace capsops
