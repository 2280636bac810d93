// The module capsops._cpu: chooses the kernels for this processor, and passes raw pointers on to them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/checks.h"
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

Dtype dtype_of(int dtype) {
    require(dtype >= 0 && dtype <= int(Dtype::float64), "dtype", dtype, "0 to 3");
    return Dtype(dtype);
}

int threads_of(int threads) {
    require(threads >= 1 && threads <= max_threads, "threads", threads, "1 to 4096");
    return threads;
}

SquashCall squash_call(const Memory& s, const Memory* grad, const Memory& out, int64_t outer, int64_t n,
                       int64_t inner, int dtype, int threads) {
    SquashCall call{};
    call.outer = outer, call.n = n, call.inner = inner;
    call.dtype = dtype_of(dtype), call.threads = threads_of(threads);
    const int64_t element = dtype_size(call.dtype);
    call.s = pointer("s", s, {outer, n, inner}, element);
    if (grad) call.grad = pointer("grad", *grad, {outer, n, inner}, element);
    call.out = pointer("out", out, {outer, n, inner}, element);
    return call;
}

PredictionsCall predictions_call(const Memory& u, const Memory& weight, int64_t B, int64_t I, int64_t J,
                                 int64_t D, int64_t K, int dtype, int threads) {
    PredictionsCall call{};
    call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
    call.dtype = dtype_of(dtype), call.threads = threads_of(threads);
    const int64_t element = dtype_size(call.dtype);
    call.u = pointer("u", u, {B, I, K}, element);
    call.weight = pointer("weight", weight, {I, J, D, K}, element);
    return call;
}

// Without `weight`, `u` is the predictions [B, I, J, D].
RoutingCall routing_call(const Memory& u, const Memory& weight, int64_t B, int64_t I, int64_t J, int64_t D,
                         int64_t K, int64_t iterations, bool leaky, bool squash_output, int dtype,
                         int threads) {
    RoutingCall call{};
    call.B = B, call.I = I, call.J = J, call.D = D, call.K = K;
    require(iterations >= 0 && iterations <= max_iterations, "iterations", iterations, "0 to 1000");
    call.iterations = iterations, call.leaky = leaky, call.squash_output = squash_output;
    call.dtype = dtype_of(dtype), call.threads = threads_of(threads);
    const int64_t element = dtype_size(call.dtype);
    call.weight = optional_pointer("weight", weight, {I, J, D, K}, element);
    call.u = call.weight ? pointer("u", u, {B, I, K}, element) : pointer("u", u, {B, I, J, D}, element);
    return call;
}

// s of every pass, in the type of the sums.
void* sums_pointer(const Memory& s, const RoutingCall& call) {
    const int64_t passes = call.iterations > 1 ? call.iterations : 1;
    return pointer("s", s, {passes, call.B, call.J, call.D}, call.dtype == Dtype::float64 ? 8 : 4);
}

void* bias_pointer(const Memory& bias, const RoutingCall& call) {
    return optional_pointer("bias", bias, {call.J, call.D}, dtype_size(call.dtype));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() =
        "Kernels for the CPU. A tensor is a pair: the address of contiguous memory, and its bytes; (0, 0) "
        "where it may be missing. What does not fit its sizes is a ValueError.";
    chosen = available().back();
    const py::call_guard<py::gil_scoped_release> without_gil;

    m.def("isas", &isas, "Instruction sets that are compiled and that this processor has, the fastest last.");
    m.def("use_isa", &use_isa, "Takes the kernels of an instruction set, by name.");
    m.def("isa", [] { return std::string(chosen->name); }, "The instruction set in use.");
    m.def(
        "fma_flops",
        [](double seconds, int threads) {
            if (!(seconds > 0 && seconds <= 60))
                throw std::invalid_argument("seconds: takes a number in 0 to 60");
            return chosen->fma_flops(seconds, threads_of(threads));
        },
        without_gil, py::arg("seconds"), py::arg("threads"),
        "Floating-point operations a second, float32, that multiply-adds on registers attain on all "
        "threads.");

    m.def(
        "squash",
        [](Memory s, Memory out, int64_t outer, int64_t n, int64_t inner, int dtype, int threads) {
            check(chosen->squash(squash_call(s, nullptr, out, outer, n, inner, dtype, threads)));
        },
        without_gil);
    m.def(
        "squash_backward",
        [](Memory grad, Memory s, Memory out, int64_t outer, int64_t n, int64_t inner, int dtype,
           int threads) {
            check(chosen->squash_backward(squash_call(s, &grad, out, outer, n, inner, dtype, threads)));
        },
        without_gil);
    m.def(
        "predictions",
        [](Memory u, Memory weight, Memory u_hat, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K,
           int dtype, int threads) {
            PredictionsCall call = predictions_call(u, weight, B, I, J, D, K, dtype, threads);
            call.u_hat = pointer("u_hat", u_hat, {B, I, J, D}, dtype_size(call.dtype));
            check(chosen->predictions(call));
        },
        without_gil);
    m.def(
        "predictions_backward",
        [](Memory grad, Memory u, Memory weight, Memory grad_u, Memory grad_weight, int64_t B, int64_t I,
           int64_t J, int64_t D, int64_t K, int dtype, int threads) {
            PredictionsCall call = predictions_call(u, weight, B, I, J, D, K, dtype, threads);
            const int64_t element = dtype_size(call.dtype);
            call.grad = pointer("grad", grad, {B, I, J, D}, element);
            call.grad_u = optional_pointer("grad_u", grad_u, {B, I, K}, element);
            call.grad_weight = optional_pointer("grad_weight", grad_weight, {I, J, D, K}, element);
            check(chosen->predictions_backward(call));
        },
        without_gil);
    m.def(
        "routing",
        [](Memory u, Memory weight, Memory bias, Memory v, Memory s, int64_t B, int64_t I, int64_t J,
           int64_t D, int64_t K, int64_t iterations, bool leaky, bool squash_output, int dtype, int threads) {
            RoutingCall call =
                routing_call(u, weight, B, I, J, D, K, iterations, leaky, squash_output, dtype, threads);
            call.bias = bias_pointer(bias, call);
            call.v = pointer("v", v, {B, J, D}, dtype_size(call.dtype));
            call.s = sums_pointer(s, call);
            check(chosen->routing(call));
        },
        without_gil);
    m.def(
        "routing_backward",
        [](Memory grad, Memory u, Memory weight, Memory s, Memory grad_u, Memory grad_weight,
           Memory grad_bias, int64_t B, int64_t I, int64_t J, int64_t D, int64_t K, int64_t iterations,
           bool leaky, bool detach, bool squash_output, int dtype, int threads) {
            RoutingCall call =
                routing_call(u, weight, B, I, J, D, K, iterations, leaky, squash_output, dtype, threads);
            call.detach = detach;
            const int64_t element = dtype_size(call.dtype);
            call.s = sums_pointer(s, call);
            call.grad = pointer("grad", grad, {B, J, D}, element);
            call.grad_u = call.weight ? optional_pointer("grad_u", grad_u, {B, I, K}, element)
                                      : pointer("grad_u", grad_u, {B, I, J, D}, element);
            call.grad_weight = optional_pointer("grad_weight", grad_weight, {I, J, D, K}, element);
            call.grad_bias = pointer("grad_bias", grad_bias, {J, D}, element);
            if (!call.weight && call.grad_weight)
                throw std::invalid_argument("grad_weight: got one without weight");
            check(chosen->routing_backward(call));
        },
        without_gil);
    m.def(
        "couplings",
        [](Memory u, Memory weight, Memory bias, Memory couplings, int64_t B, int64_t I, int64_t J, int64_t D,
           int64_t K, int64_t iterations, bool leaky, int dtype, int threads) {
            RoutingCall call =
                routing_call(u, weight, B, I, J, D, K, iterations, leaky, true, dtype, threads);
            if (!call.weight) throw std::invalid_argument("weight: got none, takes one");
            call.bias = bias_pointer(bias, call);
            call.couplings = pointer("couplings", couplings, {B, I, J}, dtype_size(call.dtype));
            check(chosen->couplings(call));
        },
        without_gil);
}
