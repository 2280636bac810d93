// The module capsops._cpu: chooses the kernels for this processor and passes raw pointers to them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/checked_calls.h"
#include "kernels.h"

namespace py = pybind11;

#define CAPSOPS_DECLARE(isa)                                                                         \
    namespace capsops {                                                                              \
    namespace isa {                                                                                  \
    bool squash(const SquashCall&, int);                                                             \
    bool squash_backward(const SquashCall&, int);                                                    \
    bool predictions(const PredictionsCall&, int);                                                   \
    bool predictions_backward(const PredictionsCall&, int);                                          \
    bool routing(RoutingOp, const RoutingCall&, int);                                                \
    double fma_flops(double, int);                                                                   \
    constexpr Kernels kernels{#isa,    squash,   squash_backward, predictions, predictions_backward, \
                              routing, fma_flops};                                                   \
    }                                                                                                \
    }

CAPSOPS_DECLARE(baseline)
#if defined(__x86_64__)
CAPSOPS_DECLARE(avx2)
CAPSOPS_DECLARE(avx512)
#endif

namespace {

using namespace capsops;

constexpr int max_threads = 4096;

// The compiled instruction sets that this processor supports, the fastest last.
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> supported{&baseline::kernels};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        supported.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        supported.push_back(&avx512::kernels);
    }
#endif
    return supported;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
    return names;
}

const Kernels* chosen = nullptr;

void use_isa(const std::string& name) {
    std::string names;
    for (const Kernels* kernels : available()) {
        if (kernels->name == name) {
            chosen = kernels;
            return;
        }
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("CAPSOPS_CPU_ISA: got '" + name + "', takes one of " + names);
}

void check(bool allocated) {
    if (!allocated) throw std::bad_alloc();
}

Dtype dtype_of(int dtype) { return checked_dtype(dtype, Dtype::float64); }

int checked_threads(int threads) {
    require(threads >= 1 && threads <= max_threads, "threads", threads, "1 to 4096");
    return threads;
}

// What most calls of routing do without: whether the weight is shared; the mask; the starting logits, their
// sizes and strides, and their gradient.
typedef std::tuple<bool, Memory, Memory, std::array<int64_t, 3>, std::array<int64_t, 3>, Memory> Options;

void run_routing(RoutingOp op, RoutingCall call, const RoutingTensors& tensors,
                 const std::optional<Options>& options, int threads) {
    if (options) {
        const auto& [shared, mask, logits, sizes, strides, grad_logits] = *options;
        call.shared = shared;
        set_mask(call, mask);
        set_logits(call, logits, sizes, strides, grad_logits);
    }
    set_tensors(call, tensors);
    require_tensors(op, call);
    require(op != RoutingOp::couplings || call.iterations > 1 || call.logits.data, "iterations",
            call.iterations, "2 or more without starting logits: the couplings of one pass are uniform");
    check(chosen->routing(op, call, checked_threads(threads)));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() =
        "Kernels for the CPU. A tensor is a pair: the address of contiguous memory and its length in\n"
        "bytes, or (0, 0) for an optional tensor that is missing. A length that does not match the sizes\n"
        "is a ValueError.";
    chosen = available().back();
    const py::call_guard<py::gil_scoped_release> without_gil;

    m.def("isas", &isas, "The compiled instruction sets that this processor supports, the fastest last.");
    m.def("use_isa", &use_isa, "Selects the kernels of an instruction set by name.");
    m.def("isa", [] { return std::string(chosen->name); }, "The instruction set in use.");
    m.def(
        "fma_flops",
        [](double seconds, int threads) {
            if (!(seconds > 0 && seconds <= 60))
                throw std::invalid_argument("seconds: takes a number in 0 to 60");
            return chosen->fma_flops(seconds, checked_threads(threads));
        },
        without_gil, py::arg("seconds"), py::arg("threads"),
        "Floating-point operations per second (float32) of multiply-adds on registers, on all threads.");

    m.def(
        "squash",
        [](Memory s, Memory out, int64_t outer, int64_t n, int64_t inner, int dtype, int threads) {
            const SquashCall call = squash_call(s, Memory(), out, outer, n, inner, dtype_of(dtype));
            check(chosen->squash(call, checked_threads(threads)));
        },
        without_gil);
    m.def(
        "squash_backward",
        [](Memory grad, Memory s, Memory out, int64_t outer, int64_t n, int64_t inner, int dtype,
           int threads) {
            const SquashCall call = squash_call(s, grad, out, outer, n, inner, dtype_of(dtype));
            require_tensor("grad", call.grad);
            check(chosen->squash_backward(call, checked_threads(threads)));
        },
        without_gil);
    m.def(
        "predictions",
        [](Memory u, Memory weight, Memory u_hat, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K,
           int dtype, int threads) {
            PredictionsCall call = predictions_call(u, weight, B, I, J, D, K, dtype_of(dtype));
            set_output(call, u_hat);
            check(chosen->predictions(call, checked_threads(threads)));
        },
        without_gil);
    m.def(
        "predictions_backward",
        [](Memory grad, Memory u, Memory weight, Memory grad_u, Memory grad_weight, int64_t B, int64_t I,
           int64_t J, int64_t D, int64_t K, int dtype, int threads) {
            PredictionsCall call = predictions_call(u, weight, B, I, J, D, K, dtype_of(dtype));
            set_gradients(call, grad, grad_u, grad_weight);
            check(chosen->predictions_backward(call, checked_threads(threads)));
        },
        without_gil);
    m.def(
        "routing",
        [](Memory u, Memory weight, Memory bias, Memory v, Memory s, std::optional<Options> options,
           int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int64_t iterations, bool leaky,
           bool squash_output, int dtype, int threads) {
            RoutingTensors tensors;
            tensors.u = u, tensors.weight = weight, tensors.bias = bias, tensors.v = v, tensors.s = s;
            const RoutingCall call =
                routing_call(B, I, J, D, K, iterations, leaky, false, squash_output, dtype_of(dtype));
            run_routing(RoutingOp::forward, call, tensors, options, threads);
        },
        without_gil);
    m.def(
        "routing_backward",
        [](Memory grad, Memory u, Memory weight, Memory s, Memory grad_u, Memory grad_weight,
           Memory grad_bias, std::optional<Options> options, int64_t B, int64_t I, int64_t J, int64_t D,
           int64_t K, int64_t iterations, bool leaky, bool detach, bool squash_output, int dtype,
           int threads) {
            RoutingTensors tensors;
            tensors.u = u, tensors.weight = weight, tensors.s = s, tensors.grad = grad;
            tensors.grad_u = grad_u, tensors.grad_weight = grad_weight, tensors.grad_bias = grad_bias;
            const RoutingCall call =
                routing_call(B, I, J, D, K, iterations, leaky, detach, squash_output, dtype_of(dtype));
            run_routing(RoutingOp::backward, call, tensors, options, threads);
        },
        without_gil);
    m.def(
        "couplings",
        [](Memory u, Memory weight, Memory bias, Memory couplings, std::optional<Options> options, int64_t B,
           int64_t I, int64_t J, int64_t D, int64_t K, int64_t iterations, bool leaky, int dtype,
           int threads) {
            RoutingTensors tensors;
            tensors.u = u, tensors.weight = weight, tensors.bias = bias, tensors.couplings = couplings;
            const RoutingCall call =
                routing_call(B, I, J, D, K, iterations, leaky, false, true, dtype_of(dtype));
            run_routing(RoutingOp::couplings, call, tensors, options, threads);
        },
        without_gil);
}
