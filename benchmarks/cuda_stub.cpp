// The module capsops._cuda without a GPU: its own bindings, above kernels that do nothing.
#include "cuda/bindings.cpp"

namespace emulator {
Settings settings;
}

namespace capsops {

void squash(const SquashCall&, Stream) {}
void squash_backward(const SquashCall&, Stream) {}
void predictions(const PredictionsCall&, const Device&, Stream) {}
void predictions_backward(const PredictionsCall&, const Device&, Stream) {}
int64_t routing_workspace(RoutingOp, const RoutingCall&, const RoutingMode&, const Device&) {
    return 1 << 16;
}
void routing(RoutingOp, const RoutingCall&, const RoutingMode&, void*, const Device&, Stream) {}

}  // namespace capsops
