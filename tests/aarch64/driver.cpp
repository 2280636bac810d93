// Calls the kernels of csrc/cpu without Python, for tests on an emulated processor: driver INPUTS RESULTS.
//
// INPUTS is a sequence of calls. Each is 12 numbers of 64 bits (op, dtype, threads, B, I, J, D, K,
// iterations, leaky, detach, bias) and then its tensors; RESULTS has the results of all calls one after the
// other.
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

struct Header {
    int64_t op, dtype, threads, B, I, J, D, K, iterations, leaky, detach, bias;
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
        require(std::fread(tensor.data(), 1, tensor.bytes_.size(), inputs) == tensor.bytes_.size(),
                "the inputs end early");
        return tensor;
    }
    void write() {
        require(std::fwrite(data(), 1, bytes_.size(), results) == bytes_.size(), "cannot write the results");
    }
    void* data() { return bytes_.data(); }
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
    call.B = h.B, call.I = h.I, call.J = h.J, call.D = h.D, call.K = h.K, call.dtype = dtype;
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

// u, W, β if there is one, ∂v → v, ∂u, ∂W, ∂β and, from the second pass on, c. K = 0: u is û, there is no W,
// and there are no couplings.
void routing(const Header& h) {
    const Dtype dtype = Dtype(h.dtype);
    const int64_t element = dtype_size(dtype), threads = h.threads;
    const bool has_weight = h.K > 0;
    const int64_t u_bytes = h.B * h.I * (has_weight ? h.K : h.J * h.D) * element;
    const int64_t weight_bytes = h.I * h.J * h.D * h.K * element, bias_bytes = h.J * h.D * element;
    const int64_t v_bytes = h.B * bias_bytes;
    Tensor u = Tensor::read(u_bytes), weight = Tensor::read(weight_bytes);
    Tensor bias = Tensor::read(h.bias ? bias_bytes : 0), grad = Tensor::read(v_bytes);
    Tensor s(larger(h.iterations, 1) * h.B * h.J * h.D * sum_size(dtype)), v(v_bytes);
    Tensor grad_u(u_bytes), grad_weight(weight_bytes), grad_bias(bias_bytes);
    Tensor couplings(h.B * h.I * h.J * element);

    RoutingCall call{};
    call.u = u.data();
    call.weight = has_weight ? weight.data() : nullptr;
    call.bias = h.bias ? bias.data() : nullptr;
    call.s = s.data();
    call.v = v.data();
    call.B = h.B, call.I = h.I, call.J = h.J, call.D = h.D, call.K = has_weight ? h.K : 1;
    call.iterations = h.iterations, call.leaky = h.leaky, call.detach = h.detach;
    call.squash_output = true;
    call.dtype = dtype;
    require(baseline::routing(RoutingOp::forward, call, int(threads)), "no memory");
    call.grad = grad.data();
    call.grad_u = grad_u.data();
    call.grad_weight = has_weight ? grad_weight.data() : nullptr;
    call.grad_bias = grad_bias.data();
    require(baseline::routing(RoutingOp::backward, call, int(threads)), "no memory");
    v.write();
    grad_u.write();
    grad_weight.write();
    grad_bias.write();
    if (!has_weight || h.iterations < 2) return;
    call.s = nullptr;
    call.couplings = couplings.data();
    require(baseline::routing(RoutingOp::couplings, call, int(threads)), "no memory");
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
