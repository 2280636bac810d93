// What the kernels of one instruction set offer to the bindings.
#pragma once

#include "common/calls.h"

namespace capsops {

// Every function but the last returns false when it could not allocate its workspace.
struct Kernels {
    const char* name;
    bool (*squash)(const SquashCall&, int threads);
    bool (*squash_backward)(const SquashCall&, int threads);
    bool (*predictions)(const PredictionsCall&, int threads);
    bool (*predictions_backward)(const PredictionsCall&, int threads);
    bool (*routing)(RoutingOp, const RoutingCall&, int threads);
    double (*fma_flops)(double seconds, int threads);  // floating-point operations per second, float32
};

}  // namespace capsops
