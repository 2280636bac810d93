// The forward pass of dynamic_routing with one block for each sample, whose predictions are cached in shared
// memory as far as they fit.
#pragma once

#include "plan.h"
#include "routing.h"

namespace capsops {

struct SmemCached {
    Routing p;
    SmemCachedTiling tiling;
    bool vectors;  // u_hat is copied 16 bytes at a time
};

void smem_cached_passes(const SmemCached& call, Dtype dtype, Stream stream);

}  // namespace capsops
