// The module capsops._cuda: passes raw pointers and the raw stream to the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/checked_calls.h"
#include "kernels.h"
#include "plan.h"

namespace py = pybind11;

namespace {

using namespace capsops;

Stream stream_of(uintptr_t stream) { return reinterpret_cast<Stream>(stream); }

Dtype dtype_of(int dtype) { return checked_dtype(dtype, Dtype::float16); }

// What most calls of routing do without: whether the weight is shared; the mask; the starting logits, their
// sizes and strides, and their gradient.
typedef std::tuple<bool, Memory, Memory, std::array<int64_t, 3>, std::array<int64_t, 3>, Memory> Options;

// Where a call of routing runs, and the memory that its kernels may use.
struct Place {
    Memory workspace;
    int device;
    uintptr_t stream;
};

// The kernels would take such a call for one without these options, and read beyond its tensors.
void decline_options(const RoutingCall& call) {
    const char* option = call.shared           ? "shared weights or predictions"
                         : call.mask           ? "mask"
                         : call.logits.data    ? "logits"
                         : !call.squash_output ? "squash_output=False"
                                               : nullptr;
    if (option)
        throw std::invalid_argument(std::string("options: got ") + option + ", takes none on a CUDA device");
}

// Queues the kernels of a call and returns the bytes of workspace that they take. Where the workspace is
// shorter it only returns them.
int64_t run_routing(RoutingOp op, RoutingCall call, const RoutingTensors& tensors,
                    const std::optional<Options>& options, bool tf32, const Place& place) {
    if (options) {
        const auto& [shared, mask, logits, sizes, strides, grad_logits] = *options;
        call.shared = shared;
        set_mask(call, mask);
        set_logits(call, logits, sizes, strides, grad_logits);
    }
    bytes_of("shape", {call.B, call.I, call.J, call.D, call.K}, 1);
    set_tensors(call, tensors);
    require_tensors(op, call);
    require(op != RoutingOp::couplings || call.iterations > 1 || call.logits.data, "iterations",
            call.iterations, "2 or more without starting logits: the couplings of one pass are uniform");
    decline_options(call);
    const CurrentDevice current(place.device);
    const Device limits = current.limits();
    const RoutingMode mode{tf32, true};
    const int64_t bytes = routing_workspace(op, call, mode, limits);
    const Memory& workspace = place.workspace;
    require((workspace.first != 0) == (workspace.second > 0), "workspace", workspace.second,
            "the bytes at its address, or 0 bytes at address 0");
    if (workspace.second >= bytes)
        routing(op, call, mode, reinterpret_cast<void*>(workspace.first), limits, stream_of(place.stream));
    return bytes;
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
                                     : plan_precomputed_passes(shape, limits, resident_blocks, tiling);
    return supported ? py::object(as_dict(tiling)) : py::none();
}

// The plan of the passes over u and W; None if they do not support the shape.
py::object pass_plan(int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int depth, int w_quads,
                     int u_words, bool backward, int multiprocessors, int64_t shared_per_block,
                     const std::array<int, 4>& clusters) {
    const PassShape shape{B, I, J, D, K, depth, w_quads, u_words, backward};
    PassTiling t{};
    if (!plan_pass_tiles(shape, {multiprocessors, shared_per_block}, t)) return py::none();
    divide_input_capsules(shape, {clusters[0], clusters[1], clusters[2], clusters[3]}, t);
    py::dict plan;
    plan["n"] = t.n, plan["few"] = t.few, plan["tile_j"] = t.tile_j, plan["m_tiles"] = t.m_tiles;
    plan["groups"] = t.groups, plan["cluster"] = t.cluster, plan["steps"] = t.steps;
    plan["slot_words"] = t.slot_words, plan["tiles_b"] = t.tiles_b, plan["tiles_j"] = t.tiles_j;
    plan["splits"] = t.splits, plan["length"] = t.length, plan["items"] = t.items;
    plan["capsules_offset"] = t.capsules_offset, plan["progress_offset"] = t.progress_offset,
    plan["shared"] = t.shared;
    return plan;
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
          "How the passes over precomputed predictions, or the gradients, divide the work on a device (by "
          "default\n"
          "an H200): a dict, or None if the general kernels are used for the shape. Needs no device.");
    m.def("pass_plan", &pass_plan, py::arg("B"), py::arg("I"), py::arg("J"), py::arg("D"), py::arg("K"),
          py::arg("depth") = 8, py::arg("w_quads") = 2, py::arg("u_words") = 4, py::arg("backward") = false,
          py::arg("multiprocessors") = 132, py::arg("shared_per_block") = 232448,
          py::arg("clusters") = std::array<int, 4>{132, 66, 33, 16},
          "How the passes over u and W divide the work on a device (by default an H200, in TF32), where\n"
          "clusters[n] clusters of 2^n blocks run at a time: a dict, or None if they do not support the\n"
          "shape. Needs no device.");
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

    m.def(
        "routing",
        [](Memory u, Memory weight, Memory bias, Memory v, Memory s, std::optional<Options> options,
           int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int64_t iterations, bool leaky,
           bool squash_output, int dtype, bool tf32, Memory workspace, int device, uintptr_t stream) {
            RoutingTensors tensors;
            tensors.u = u, tensors.weight = weight, tensors.bias = bias, tensors.v = v, tensors.s = s;
            const RoutingCall call =
                routing_call(B, I, J, D, K, iterations, leaky, false, squash_output, dtype_of(dtype));
            return run_routing(RoutingOp::forward, call, tensors, options, tf32, {workspace, device, stream});
        },
        without_gil,
        "Without `weight`, `u` is the precomputed predictions [B, I, J, D]. Returns the bytes of workspace\n"
        "that the call takes; where `workspace` is shorter, nothing else is done.");
    m.def(
        "routing_backward",
        [](Memory grad, Memory u, Memory weight, Memory s, Memory grad_u, Memory grad_weight,
           Memory grad_bias, std::optional<Options> options, int64_t B, int64_t I, int64_t J, int64_t D,
           int64_t K, int64_t iterations, bool leaky, bool detach, bool squash_output, int dtype, bool tf32,
           Memory workspace, int device, uintptr_t stream) {
            RoutingTensors tensors;
            tensors.u = u, tensors.weight = weight, tensors.s = s, tensors.grad = grad;
            tensors.grad_u = grad_u, tensors.grad_weight = grad_weight, tensors.grad_bias = grad_bias;
            const RoutingCall call =
                routing_call(B, I, J, D, K, iterations, leaky, detach, squash_output, dtype_of(dtype));
            return run_routing(RoutingOp::backward, call, tensors, options, tf32,
                               {workspace, device, stream});
        },
        without_gil, "Returns what routing() returns.");
    m.def(
        "couplings",
        [](Memory u, Memory weight, Memory bias, Memory couplings, std::optional<Options> options, int64_t B,
           int64_t I, int64_t J, int64_t D, int64_t K, int64_t iterations, bool leaky, int dtype, bool tf32,
           Memory workspace, int device, uintptr_t stream) {
            RoutingTensors tensors;
            tensors.u = u, tensors.weight = weight, tensors.bias = bias, tensors.couplings = couplings;
            const RoutingCall call =
                routing_call(B, I, J, D, K, iterations, leaky, false, true, dtype_of(dtype));
            return run_routing(RoutingOp::couplings, call, tensors, options, tf32,
                               {workspace, device, stream});
        },
        without_gil, "Returns what routing() returns.");
}
