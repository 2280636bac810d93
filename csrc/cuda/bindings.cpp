// The module capsops._cuda: passes raw pointers and the raw stream to the kernels.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/checked_calls.h"
#include "kernels.h"
#include "plan.h"

namespace py = pybind11;

namespace {

using namespace capsops;

Stream stream_of(uintptr_t stream) { return reinterpret_cast<Stream>(stream); }

Dtype dtype_of(int dtype) { return checked_dtype(dtype, Dtype::float16); }

// What Python calls a RoutingCall: the call, and how a device may compute it.
struct DeviceRoutingCall {
    RoutingCall call;
    RoutingMode mode;
};

DeviceRoutingCall device_routing_call(int64_t B, int64_t I, int64_t J, int64_t D, int64_t K,
                                      int64_t iterations, bool leaky, bool detach, int dtype, bool tf32,
                                      bool cooperative) {
    bytes_of("shape", {B, I, J, D, K}, 1);
    return {routing_call(B, I, J, D, K, iterations, leaky, detach, true, dtype_of(dtype)),
            {tf32, cooperative}};
}

py::dict as_dict(const Tiling& t) {
    py::dict plan;
    plan["n"] = t.n, plan["m"] = t.m, plan["groups"] = t.groups, plan["tile_j"] = t.tile_j;
    plan["warps"] = t.warps, plan["chunk"] = t.chunk, plan["steps"] = t.steps, plan["stride"] = t.stride;
    plan["slot"] = t.slot;
    plan["tiles_b"] = t.tiles_b, plan["tiles_j"] = t.tiles_j, plan["splits"] = t.splits;
    plan["length"] = t.length, plan["stage"] = t.stage, plan["shared"] = t.shared, plan["items"] = t.items;
    return plan;
}

// The plan of the fused kernels for a shape on a device; None if they do not support it.
py::object fused_plan(bool gradients, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int element,
                      bool tensor_cores, bool precomputed, int passes, int multiprocessors,
                      int64_t shared_per_block, int resident_blocks) {
    const FusedShape shape{B, I, J, D, K, element, tensor_cores, precomputed, passes};
    const FusedLimits limits{multiprocessors, shared_per_block};
    Tiling tiling{};
    const bool supported = gradients ? plan_gradients(shape, limits, tiling)
                                     : plan_passes(shape, limits, resident_blocks, tiling);
    return supported ? py::object(as_dict(tiling)) : py::none();
}

py::object smem_cached_plan(int64_t B, int64_t I, int64_t J, int64_t D, int element, int passes,
                            int multiprocessors, int64_t shared_per_block) {
    SmemCachedTiling t{};
    if (!plan_smem_cached({B, I, J, D, 1, element, false, true, passes}, {multiprocessors, shared_per_block},
                          t))
        return py::none();
    py::dict plan;
    plan["parts"] = t.parts, plan["row"] = t.row, plan["sets"] = t.sets, plan["warps"] = t.warps;
    plan["slots"] = t.slots, plan["ring"] = t.ring, plan["shared"] = t.shared;
    return plan;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() =
        "Kernels for CUDA devices. A tensor is a pair: the address of contiguous memory on the device and\n"
        "its length in bytes, or (0, 0) for an optional tensor that is missing. A length that does not\n"
        "match the sizes is a ValueError. Every call returns once its kernels are queued on the stream.";
    const py::call_guard<py::gil_scoped_release> without_gil;

    m.def("fused_plan", &fused_plan, py::arg("gradients"), py::arg("B"), py::arg("I"), py::arg("J"),
          py::arg("D"), py::arg("K"), py::arg("element") = 4, py::arg("tensor_cores") = true,
          py::arg("precomputed") = false, py::arg("passes") = 2, py::arg("multiprocessors") = 132,
          py::arg("shared_per_block") = 232448, py::arg("resident_blocks") = 1,
          "How the fused passes or the fused gradients of routing divide the work on a device (by default\n"
          "an H200): a dict, or None if the general kernels are used for the shape. Needs no device.");
    m.def("smem_cached_plan", &smem_cached_plan, py::arg("B"), py::arg("I"), py::arg("J"), py::arg("D"),
          py::arg("element") = 4, py::arg("passes") = 2, py::arg("multiprocessors") = 132,
          py::arg("shared_per_block") = 232448,
          "How the forward pass of dynamic_routing caches predictions in shared memory: a dict, or None if\n"
          "it does not. Needs no device.");
    m.def("device_count", &device_count, "The number of CUDA devices; 0 without a driver.");
    m.def(
        "squash",
        [](Memory s, Memory grad, Memory out, int64_t outer, int64_t n, int64_t inner, int dtype, int device,
           uintptr_t stream) {
            const SquashCall call = squash_call(s, grad, out, outer, n, inner, dtype_of(dtype));
            const CurrentDevice current(device);
            (call.grad ? squash_backward : squash)(call, stream_of(stream));
        },
        without_gil, "squash, or its vector-Jacobian product if `grad` is not missing.");
    m.def(
        "predictions",
        [](Memory u, Memory weight, Memory u_hat, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K,
           int dtype, int device, uintptr_t stream) {
            PredictionsCall call = predictions_call(u, weight, B, I, J, D, K, dtype_of(dtype));
            set_output(call, u_hat);
            const CurrentDevice current(device);
            predictions(call, current.limits(), stream_of(stream));
        },
        without_gil);
    m.def(
        "predictions_backward",
        [](Memory grad, Memory u, Memory weight, Memory grad_u, Memory grad_weight, int64_t B, int64_t I,
           int64_t J, int64_t D, int64_t K, int dtype, int device, uintptr_t stream) {
            PredictionsCall call = predictions_call(u, weight, B, I, J, D, K, dtype_of(dtype));
            set_gradients(call, grad, grad_u, grad_weight);
            const CurrentDevice current(device);
            predictions_backward(call, current.limits(), stream_of(stream));
        },
        without_gil);

    py::enum_<RoutingOp>(m, "RoutingOp", py::module_local())
        .value("forward", RoutingOp::forward)
        .value("backward", RoutingOp::backward)
        .value("couplings", RoutingOp::couplings);
    py::class_<DeviceRoutingCall>(
        m, "RoutingCall", py::module_local(),
        "One call of routing. Without `weight`, `u` is the precomputed predictions [B, I, J, D].")
        .def(py::init(&device_routing_call), py::arg("B"), py::arg("I"), py::arg("J"), py::arg("D"),
             py::arg("K"), py::arg("iterations"), py::arg("leaky"), py::arg("detach"), py::arg("dtype"),
             py::arg("tf32"), py::arg("cooperative") = true)
        .def(
            "point",
            [](DeviceRoutingCall& self, Memory u, Memory weight, Memory bias, Memory s, Memory v,
               Memory couplings, Memory grad, Memory grad_u, Memory grad_weight, Memory grad_bias) {
                set_tensors(self.call,
                            {u, weight, bias, s, v, couplings, grad, grad_u, grad_weight, grad_bias});
            },
            py::kw_only(), py::arg("u"), py::arg("weight") = Memory(), py::arg("bias") = Memory(),
            py::arg("s") = Memory(), py::arg("v") = Memory(), py::arg("couplings") = Memory(),
            py::arg("grad") = Memory(), py::arg("grad_u") = Memory(), py::arg("grad_weight") = Memory(),
            py::arg("grad_bias") = Memory(), "Sets the tensors.")
        .def(
            "workspace",
            [](const DeviceRoutingCall& self, RoutingOp op, int device) {
                return routing_workspace(op, self.call, self.mode, CurrentDevice(device).limits());
            },
            "Bytes of workspace that the call takes on this device.")
        .def(
            "run",
            [](const DeviceRoutingCall& self, RoutingOp op, Memory workspace, int device, uintptr_t stream) {
                require_tensors(op, self.call);
                const CurrentDevice current(device);
                const int64_t bytes = routing_workspace(op, self.call, self.mode, current.limits());
                require(workspace.second >= bytes && (workspace.first || bytes == 0), "workspace",
                        workspace.second, "at least the bytes that workspace() returns");
                routing(op, self.call, self.mode, reinterpret_cast<void*>(workspace.first), current.limits(),
                        stream_of(stream));
            },
            without_gil, "Queues the kernels on the stream.");
}
