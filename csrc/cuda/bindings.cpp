// The module capsops._cuda: passes raw pointers and the raw stream on to the kernels.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"
#include "plan.h"

namespace py = pybind11;

namespace {

using namespace capsops;

typedef uintptr_t Address;

template <typename T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

Stream stream_of(Address stream) { return reinterpret_cast<Stream>(stream); }

RoutingCall routing_shape(int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int64_t iterations,
                          bool leaky, bool detach, int storage, bool tf32, bool cooperative) {
    RoutingCall call{};
    call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
    call.iterations = iterations, call.leaky = leaky, call.detach = detach;
    call.storage = Storage(storage), call.tf32 = tf32, call.cooperative = cooperative;
    return call;
}

py::dict described(const Tiling& t) {
    py::dict found;
    found["n"] = t.n, found["m"] = t.m, found["groups"] = t.groups, found["tile_j"] = t.tile_j;
    found["warps"] = t.warps, found["chunk"] = t.chunk, found["steps"] = t.steps, found["stride"] = t.stride;
    found["slot"] = t.slot;
    found["tiles_b"] = t.tiles_b, found["tiles_j"] = t.tiles_j, found["splits"] = t.splits;
    found["length"] = t.length, found["stage"] = t.stage, found["shared"] = t.shared,
    found["items"] = t.items;
    return found;
}

// What plan.h says of a shape on a device; None where the fused kernels do not serve it.
py::object fused_plan(bool gradients, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int element,
                      bool tensor_cores, bool given, int passes, int multiprocessors,
                      int64_t shared_per_block, int resident_blocks) {
    const FusedShape shape{B, I, J, D, K, element, tensor_cores, given, passes};
    const FusedLimits limits{multiprocessors, shared_per_block};
    Tiling tiling{};
    const bool served = gradients ? plan_gradients(shape, limits, tiling)
                                  : plan_passes(shape, limits, resident_blocks, tiling);
    return served ? py::object(described(tiling)) : py::none();
}

py::object resident_plan(int64_t B, int64_t I, int64_t J, int64_t D, int element, int passes,
                         int multiprocessors, int64_t shared_per_block) {
    ResidentTiling t{};
    if (!plan_resident({B, I, J, D, 1, element, false, true, passes}, {multiprocessors, shared_per_block}, t))
        return py::none();
    py::dict found;
    found["parts"] = t.parts, found["row"] = t.row, found["sets"] = t.sets, found["warps"] = t.warps;
    found["slots"] = t.slots, found["ring"] = t.ring, found["shared"] = t.shared;
    return found;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() =
        "Kernels for CUDA devices. Pointers are addresses of contiguous tensors on the device; shapes are "
        "the "
        "caller's to check. Every call returns once its kernels are queued on the stream.";
    const py::call_guard<py::gil_scoped_release> without_gil;

    m.def("fused_plan", &fused_plan, py::arg("gradients"), py::arg("B"), py::arg("I"), py::arg("J"),
          py::arg("D"), py::arg("K"), py::arg("element") = 4, py::arg("tensor_cores") = true,
          py::arg("given") = false, py::arg("passes") = 2, py::arg("multiprocessors") = 132,
          py::arg("shared_per_block") = 232448, py::arg("resident_blocks") = 1,
          "How the fused passes, or the fused gradients, of capsule_routing divide the work on a device (by "
          "default "
          "an H200): a dict, or None where the general kernels serve the shape. Needs no device.");
    m.def("resident_plan", &resident_plan, py::arg("B"), py::arg("I"), py::arg("J"), py::arg("D"),
          py::arg("element") = 4, py::arg("passes") = 2, py::arg("multiprocessors") = 132,
          py::arg("shared_per_block") = 232448,
          "How dynamic_routing's forward direction keeps predictions on the chip: a dict, or None where it "
          "does not. Needs no device.");
    m.def("device_count", &device_count, "How many CUDA devices there are; 0 without a driver.");
    m.def(
        "squash",
        [](Address s, Address grad, Address out, int64_t outer, int64_t n, int64_t inner, int storage,
           int device, Address stream) {
            const CurrentDevice current(device);
            const SquashCall call{pointer(s), pointer(grad), pointer(out), outer, n, inner, Storage(storage)};
            (grad == 0 ? squash : squash_backward)(call, stream_of(stream));
        },
        without_gil, "squash, or its vector-Jacobian product where `grad` is not 0.");
    m.def(
        "predictions",
        [](Address u, Address weight, Address u_hat, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K,
           int storage, int device, Address stream) {
            PredictionsCall call{};
            call.u = pointer(u), call.weight = pointer(weight), call.u_hat = pointer(u_hat);
            call.B = B, call.I = I, call.J = J, call.D = D, call.K = K, call.storage = Storage(storage);
            const CurrentDevice current(device);
            predictions(call, current.limits(), stream_of(stream));
        },
        without_gil);
    m.def(
        "predictions_backward",
        [](Address grad, Address u, Address weight, Address grad_u, Address grad_weight, int64_t B, int64_t I,
           int64_t J, int64_t D, int64_t K, int storage, int device, Address stream) {
            PredictionsCall call{};
            call.u = pointer(u), call.weight = pointer(weight), call.grad = pointer(grad);
            call.grad_u = pointer(grad_u), call.grad_weight = pointer(grad_weight);
            call.B = B, call.I = I, call.J = J, call.D = D, call.K = K, call.storage = Storage(storage);
            const CurrentDevice current(device);
            predictions_backward(call, current.limits(), stream_of(stream));
        },
        without_gil);

    py::enum_<RoutingOp>(m, "RoutingOp", py::module_local())
        .value("forward", RoutingOp::forward)
        .value("backward", RoutingOp::backward)
        .value("couplings", RoutingOp::couplings);
    py::class_<RoutingCall>(
        m, "RoutingCall", py::module_local(),
        "One call of routing. Without `weight`, `u` is the given predictions [B, I, J, D].")
        .def(py::init(&routing_shape), py::arg("B"), py::arg("I"), py::arg("J"), py::arg("D"), py::arg("K"),
             py::arg("iterations"), py::arg("leaky"), py::arg("detach"), py::arg("storage"), py::arg("tf32"),
             py::arg("cooperative") = true)
        .def(
            "point",
            [](RoutingCall& call, Address u, Address weight, Address bias, Address s, Address v,
               Address couplings, Address grad, Address grad_u, Address grad_weight, Address grad_bias) {
                call.u = pointer(u), call.weight = pointer(weight), call.bias = pointer(bias);
                call.s = pointer<float>(s), call.v = pointer(v), call.couplings = pointer(couplings);
                call.grad = pointer(grad), call.grad_u = pointer(grad_u);
                call.grad_weight = pointer(grad_weight), call.grad_bias = pointer(grad_bias);
            },
            py::kw_only(), py::arg("u"), py::arg("weight") = 0, py::arg("bias") = 0, py::arg("s") = 0,
            py::arg("v") = 0, py::arg("couplings") = 0, py::arg("grad") = 0, py::arg("grad_u") = 0,
            py::arg("grad_weight") = 0, py::arg("grad_bias") = 0, "Sets the addresses of the tensors.")
        .def(
            "workspace",
            [](const RoutingCall& call, RoutingOp op, int device) {
                return routing_workspace(op, call, CurrentDevice(device).limits());
            },
            "Bytes of workspace that the call takes on this device.")
        .def(
            "run",
            [](RoutingCall& call, RoutingOp op, Address workspace, int device, Address stream) {
                call.workspace = pointer(workspace);
                const CurrentDevice current(device);
                routing(op, call, current.limits(), stream_of(stream));
            },
            without_gil, "Queues the kernels on the stream.");
}
