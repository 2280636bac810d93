// Calls the kernels of csrc/cpu without Python, for tests on an emulated processor: driver INPUTS RESULTS.
//
// INPUTS is a sequence of calls. Each is a Header and then its tensors; RESULTS has the results of all calls
// one after the other.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/calls.h"
#include "common/integers.h"

namespace capsops {
namespace baseline {
bool squash(const SquashCall&, int);
bool squash_backward(const SquashCall&, int);
bool predictions(const PredictionsCall&, int);
bool predictions_backward(const PredictionsCall&, int);
bool routing(RoutingOp, const RoutingCall&, int);
}  // namespace baseline
}  // namespace capsops

namespace {

using namespace capsops;

// What a call is, in numbers of 64 bits. An op does not read those that it has no use for.
struct Header {
    int64_t op, dtype, threads, B, I, J, D, K;
    int64_t iterations, leaky, detach, squash_output, shared;
    int64_t bias, mask, logits[3];  // whether there is one; the sizes of the logits, 0 if there are none
    int64_t needs_u, needs_weight, needs_logits;  // which gradients are computed beside that of the bias
};

FILE *inputs, *results;

void require(bool fine, const char* what) {
    if (fine) return;
    std::fprintf(stderr, "driver: %s\n", what);
    std::exit(1);
}

// A tensor of exactly its size, so that emulators and sanitizers see what lies beyond it.
class Tensor {
    std::vector<char> bytes_;

  public:
    // Filled with bytes that are NaN in every dtype.
    explicit Tensor(int64_t bytes) : bytes_(size_t(bytes), char(0xff)) {}

    static Tensor read(int64_t bytes) {
        Tensor tensor(bytes);
        require(bytes == 0 || std::fread(tensor.data(), size_t(bytes), 1, inputs) == 1,
                "the inputs end early");
        return tensor;
    }
    void write() {
        require(bytes_.empty() || std::fwrite(data(), bytes_.size(), 1, results) == 1,
                "cannot write the results");
    }
    // Null if it has no bytes: the tensor is then not there.
    void* data() { return bytes_.empty() ? nullptr : bytes_.data(); }
};

// s and grad [B, I, J] along the axis of I → v, ∂s
void squash(const Header& h) {
    const Dtype dtype = Dtype(h.dtype);
    const int64_t bytes = h.B * h.I * h.J * dtype_size(dtype);
    Tensor s = Tensor::read(bytes), grad = Tensor::read(bytes), v(bytes), grad_s(bytes);
    SquashCall call{};
    call.s = s.data();
    call.outer = h.B, call.n = h.I, call.inner = h.J, call.dtype = dtype;
    call.out = v.data();
    require(baseline::squash(call, int(h.threads)), "no memory");
    call.grad = grad.data();
    call.out = grad_s.data();
    require(baseline::squash_backward(call, int(h.threads)), "no memory");
    v.write();
    grad_s.write();
}

// u, W, ∂û → û, ∂u, ∂W
void predictions(const Header& h) {
    const Dtype dtype = Dtype(h.dtype);
    const int64_t element = dtype_size(dtype), u_bytes = h.B * h.I * h.K * element;
    const int64_t weight_bytes = h.I * h.J * h.D * h.K * element, bytes = h.B * h.I * h.J * h.D * element;
    Tensor u = Tensor::read(u_bytes), weight = Tensor::read(weight_bytes), grad = Tensor::read(bytes);
    Tensor u_hat(bytes), grad_u(u_bytes), grad_weight(weight_bytes);
    PredictionsCall call{};
    call.u = u.data();
    call.weight = weight.data();
    call.u_hat = u_hat.data();
    call.B = h.B, call.I = h.I, call.J = h.J, call.D = h.D, call.K = h.K;
    call.dtype = call.u_hat_dtype = dtype;
    require(baseline::predictions(call, int(h.threads)), "no memory");
    call.u_hat = nullptr;
    call.grad = grad.data();
    call.grad_u = grad_u.data();
    call.grad_weight = grad_weight.data();
    require(baseline::predictions_backward(call, int(h.threads)), "no memory");
    u_hat.write();
    grad_u.write();
    grad_weight.write();
}

// u, W, β, logits, mask and ∂v, those that there are → v, the gradients that are needed (∂u, ∂W, ∂β, ∂logits)
// and, unless they are constant, c. K = 0: u is û, there is no W, and there are no couplings.
void routing(const Header& h) {
    const Dtype dtype = Dtype(h.dtype);
    const int64_t element = dtype_size(dtype);
    const int threads = int(h.threads);
    const bool has_weight = h.K > 0;
    const int64_t u_bytes = h.B * h.I * (has_weight ? h.K : h.shared ? h.D : h.J * h.D) * element;
    const int64_t weight_bytes = (h.shared ? 1 : h.I) * h.J * h.D * h.K * element;
    const int64_t bias_bytes = h.J * h.D * element, v_bytes = h.B * bias_bytes;
    const int64_t logits_bytes = h.logits[0] * h.logits[1] * h.logits[2] * element;
    Tensor u = Tensor::read(u_bytes), weight = Tensor::read(weight_bytes);
    Tensor bias = Tensor::read(h.bias ? bias_bytes : 0), logits = Tensor::read(logits_bytes);
    Tensor mask = Tensor::read(h.mask ? h.B * h.I : 0), grad = Tensor::read(v_bytes);
    Tensor s(larger(h.iterations, 1) * h.B * h.J * h.D * sum_size(dtype)), v(v_bytes);
    Tensor grad_u(h.needs_u ? u_bytes : 0), grad_weight(h.needs_weight ? weight_bytes : 0);
    Tensor grad_bias(bias_bytes), grad_logits(h.needs_logits ? logits_bytes : 0);
    Tensor couplings(h.B * h.I * h.J * element);

    RoutingCall call{};
    call.u = u.data();
    call.weight = weight.data();
    call.logits.data = logits.data();
    int64_t stride = 1;
    for (int axis = 2; axis >= 0; --axis) {
        call.logits.sizes[axis] = h.logits[axis];
        call.logits.strides[axis] = h.logits[axis] == 1 ? 0 : stride;
        stride *= h.logits[axis];
    }
    call.mask = static_cast<const uint8_t*>(mask.data());
    call.B = h.B, call.I = h.I, call.J = h.J, call.D = h.D, call.K = has_weight ? h.K : 1;
    call.iterations = h.iterations, call.leaky = h.leaky, call.detach = h.detach;
    call.squash_output = h.squash_output, call.shared = h.shared;
    call.dtype = call.u_hat_dtype = dtype;

    // Each op gets its own tensors and no others, as from Python.
    RoutingCall forward = call, backward = call, of_couplings = call;
    forward.bias = of_couplings.bias = bias.data();
    forward.s = s.data();
    forward.v = v.data();
    require(baseline::routing(RoutingOp::forward, forward, threads), "no memory");
    backward.s = s.data();
    backward.grad = grad.data();
    backward.grad_u = grad_u.data();
    backward.grad_weight = grad_weight.data();
    backward.grad_bias = grad_bias.data();
    backward.grad_logits = grad_logits.data();
    require(baseline::routing(RoutingOp::backward, backward, threads), "no memory");
    v.write();
    grad_u.write();
    grad_weight.write();
    if (h.bias) grad_bias.write();
    grad_logits.write();
    if (!has_weight || (h.iterations < 2 && !call.logits.data)) return;
    of_couplings.couplings = couplings.data();
    require(baseline::routing(RoutingOp::couplings, of_couplings, threads), "no memory");
    couplings.write();
}

}  // namespace

int main(int count, char** arguments) {
    require(count == 3, "takes a file of inputs and a file for the results");
    inputs = std::fopen(arguments[1], "rb");
    results = std::fopen(arguments[2], "wb");
    require(inputs && results, "cannot open the files");
    Header header;
    while (std::fread(&header, sizeof(header), 1, inputs) == 1) {
        require(header.op >= 0 && header.op <= 2, "an unknown op");
        (header.op == 0 ? squash : header.op == 1 ? predictions : routing)(header);
    }
    require(std::fclose(results) == 0, "cannot write the results");
    return 0;
}
