// The module capsops._cpu: chooses the kernels for this processor, and passes raw pointers on to them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

#define CAPSOPS_DECLARE(isa)                                                                                 \
    namespace capsops {                                                                                      \
    namespace isa {                                                                                          \
    bool squash(const SquashCall&);                                                                          \
    bool squash_backward(const SquashCall&);                                                                 \
    bool predictions(const PredictionsCall&);                                                                \
    bool predictions_backward(const PredictionsCall&);                                                       \
    bool routing(const RoutingCall&);                                                                        \
    bool routing_backward(const RoutingCall&);                                                               \
    bool couplings(const RoutingCall&);                                                                      \
    double fma_flops(double, int);                                                                           \
    constexpr Kernels kernels{#isa,    squash,           squash_backward, predictions, predictions_backward, \
                              routing, routing_backward, couplings,       fma_flops};                        \
    }                                                                                                        \
    }

CAPSOPS_DECLARE(baseline)
#if defined(__x86_64__)
CAPSOPS_DECLARE(avx2)
CAPSOPS_DECLARE(avx512)
#endif

namespace {

using namespace capsops;

// What this processor runs of what was compiled, the fastest last.
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found{&baseline::kernels};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&avx512::kernels);
    }
#endif
    return found;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
    return names;
}

const Kernels* chosen = nullptr;

void use_isa(const std::string& wanted) {
    std::string names;
    for (const Kernels* kernels : available()) {
        if (kernels->name == wanted) {
            chosen = kernels;
            return;
        }
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("CAPSOPS_CPU_ISA: got '" + wanted + "', takes one of " + names);
}

void check(bool allocated) {
    if (!allocated) throw std::bad_alloc();
}

typedef uintptr_t Address;

template <typename T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

SquashCall squash_call(Address s, Address grad, Address out, int64_t outer, int64_t n, int64_t inner,
                       int storage, int threads) {
    return {pointer(s), pointer(grad), pointer(out), outer, n, inner, Storage(storage), threads};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() =
        "Kernels for the CPU. Pointers are addresses of contiguous tensors; shapes are the caller's to "
        "check.";
    chosen = available().back();
    const py::call_guard<py::gil_scoped_release> without_gil;

    m.def("isas", &isas, "Instruction sets that are compiled and that this processor has, the fastest last.");
    m.def("use_isa", &use_isa, "Takes the kernels of an instruction set, by name.");
    m.def("isa", [] { return std::string(chosen->name); }, "The instruction set in use.");
    m.def(
        "fma_flops", [](double seconds, int threads) { return chosen->fma_flops(seconds, threads); },
        without_gil, py::arg("seconds"), py::arg("threads"),
        "Floating-point operations a second, float32, that multiply-adds on registers attain on all "
        "threads.");

    m.def(
        "squash",
        [](Address s, Address out, int64_t outer, int64_t n, int64_t inner, int storage, int threads) {
            check(chosen->squash(squash_call(s, 0, out, outer, n, inner, storage, threads)));
        },
        without_gil);
    m.def(
        "squash_backward",
        [](Address grad, Address s, Address out, int64_t outer, int64_t n, int64_t inner, int storage,
           int threads) {
            check(chosen->squash_backward(squash_call(s, grad, out, outer, n, inner, storage, threads)));
        },
        without_gil);
    m.def(
        "predictions",
        [](Address u, Address weight, Address u_hat, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K,
           int storage, int threads) {
            PredictionsCall call{};
            call.u = pointer(u), call.weight = pointer(weight), call.u_hat = pointer(u_hat);
            call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
            call.storage = Storage(storage), call.threads = threads;
            check(chosen->predictions(call));
        },
        without_gil);
    m.def(
        "predictions_backward",
        [](Address grad, Address u, Address weight, Address grad_u, Address grad_weight, int64_t B, int64_t I,
           int64_t J, int64_t D, int64_t K, int storage, int threads) {
            PredictionsCall call{};
            call.u = pointer(u), call.weight = pointer(weight), call.grad = pointer(grad);
            call.grad_u = pointer(grad_u), call.grad_weight = pointer(grad_weight);
            call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
            call.storage = Storage(storage), call.threads = threads;
            check(chosen->predictions_backward(call));
        },
        without_gil);
    m.def(
        "routing",
        [](Address u, Address weight, Address bias, Address v, Address s, int64_t B, int64_t I, int64_t J,
           int64_t D, int64_t K, int64_t iterations, bool leaky, int storage, int threads) {
            RoutingCall call{};
            call.u = pointer(u), call.weight = pointer(weight), call.bias = pointer(bias);
            call.v = pointer(v), call.s = pointer(s);
            call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
            call.iterations = iterations, call.leaky = leaky;
            call.storage = Storage(storage), call.threads = threads;
            check(chosen->routing(call));
        },
        without_gil);
    m.def(
        "routing_backward",
        [](Address grad, Address u, Address weight, Address s, Address grad_u, Address grad_weight,
           Address grad_bias, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int64_t iterations,
           bool leaky, bool detach, int storage, int threads) {
            RoutingCall call{};
            call.u = pointer(u), call.weight = pointer(weight), call.s = pointer(s),
            call.grad = pointer(grad);
            call.grad_u = pointer(grad_u), call.grad_weight = pointer(grad_weight);
            call.grad_bias = pointer(grad_bias);
            call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
            call.iterations = iterations, call.leaky = leaky, call.detach = detach;
            call.storage = Storage(storage), call.threads = threads;
            check(chosen->routing_backward(call));
        },
        without_gil);
    m.def(
        "couplings",
        [](Address u, Address weight, Address bias, Address couplings, int64_t B, int64_t I, int64_t J,
           int64_t D, int64_t K, int64_t iterations, bool leaky, int storage, int threads) {
            RoutingCall call{};
            call.u = pointer(u), call.weight = pointer(weight), call.bias = pointer(bias);
            call.couplings = pointer(couplings);
            call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
            call.iterations = iterations, call.leaky = leaky;
            call.storage = Storage(storage), call.threads = threads;
            check(chosen->couplings(call));
        },
        without_gil);
}
