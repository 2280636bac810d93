// What the kernels offer to the bindings, and what they share.
#pragma once

#include <stdexcept>

#include "common/calls.h"
#include "common/integers.h"
#include "device.h"

namespace capsops {

void squash(const SquashCall& call, Stream stream);
void squash_backward(const SquashCall& call, Stream stream);
void predictions(const PredictionsCall& call, const Device& device, Stream stream);
void predictions_backward(const PredictionsCall& call, const Device& device, Stream stream);

// How a device may compute a call of routing.
struct RoutingMode {
    bool tf32;         // float32 products may be rounded to TF32
    bool cooperative;  // one launch for all passes if the device supports it, else one launch for each step
};

// Bytes of workspace that the call takes. Of its pointers it only matters which are null.
int64_t routing_workspace(RoutingOp op, const RoutingCall& call, const RoutingMode& mode,
                          const Device& device);
void routing(RoutingOp op, const RoutingCall& call, const RoutingMode& mode, void* workspace,
             const Device& device, Stream stream);

#if defined(__CUDACC__) || defined(CAPSOPS_EMULATED)
// Calls function(T()) with the type of the numbers of a dtype.
template <typename Function>
void with_dtype(Dtype dtype, Function function) {
    switch (dtype) {
        case Dtype::float32:
            return function(float());
        case Dtype::bfloat16:
            return function(Bfloat16());
        case Dtype::float16:
            return function(Float16());
        case Dtype::float64:
            throw std::invalid_argument("the CUDA kernels take no float64");
    }
}
#endif

// The number of blocks for `work` items, within the limit of a launch; kernels loop over the rest.
inline int64_t blocks_for(int64_t work, int64_t work_per_block) {
    return larger(1, smaller(divide_up(work, work_per_block), int64_t(1) << 20));
}

}  // namespace capsops
