// Routing from beginning to end: workspace, the passes in their order, the gradient of the bias.
#include "routing.h"
#include "routing_general.h"

namespace capsops {
namespace {

constexpr int threads = 256;

template <typename S>
CAPSOPS_KERNEL(threads, 2)
finish_forward_kernel(Routing p) {
    finish_forward<S>(p);
}

template <typename S>
CAPSOPS_KERNEL(threads, 2)
begin_backward_kernel(Routing p) {
    begin_backward<S>(p);
}

CAPSOPS_KERNEL(threads, 2)
finish_backward_kernel(Routing p) { finish_backward(p); }

// dbias = sum over passes and batch of ds: lanes lie along [J, D], the warps of a block share the rows.
template <typename S>
CAPSOPS_KERNEL(threads, 4)
grad_bias_kernel(Routing p) {
    float* const sums = reinterpret_cast<float*>(shared_memory());
    const int64_t columns = p.J * p.D, begin = (p.detach ? p.iterations - 1 : 0) * p.B,
                  end = p.iterations * p.B;
    for (int64_t base = block_index() * warp_size; base < columns; base += block_count() * warp_size) {
        const int64_t column = base + lane_index();
        float sum = 0.0f;
        if (column < columns) {
#pragma unroll 4
            for (int64_t row = begin + warp_index(); row < end; row += threads / warp_size) {
                sum += p.grad_s[row * columns + column];
            }
        }
        sums[thread_index()] = sum;
        block_barrier();
        if (warp_index() == 0 && column < columns) {
            float total = 0.0f;
            for (int warp = 0; warp < threads / warp_size; ++warp)
                total += sums[warp * warp_size + lane_index()];
            narrow(total, static_cast<S*>(p.grad_bias)[column]);
        }
        block_barrier();
    }
}

void for_capsules(void (*kernel)(Routing), const char* name, const Routing& p, Stream stream) {
    launch(kernel, Launch{name, blocks_for(p.B * p.J, threads / warp_size), threads, 0, stream}, p);
}

Routing parameters(RoutingOp op, const RoutingCall& call) {
    Routing p{};
    p.u = call.u, p.weight = call.weight, p.bias = call.bias, p.v = call.v, p.s = call.s;
    p.couplings = call.couplings, p.grad = call.grad;
    p.grad_u = call.grad_u, p.grad_weight = call.grad_weight, p.grad_bias = call.grad_bias;
    p.B = call.B, p.I = call.I, p.J = call.J, p.D = call.D, p.K = call.K;
    p.iterations = int(call.iterations < 1 ? 1 : call.iterations);
    p.first = call.iterations == 0 ? 1.0f : 1.0f / float(call.J + call.leaky);
    p.leaky = call.leaky, p.detach = call.detach, p.backward = op == RoutingOp::backward;
    return p;
}

// Hands out pieces of the workspace, aligned to 256 bytes; from null it counts alone.
class Pieces {
  public:
    explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(int64_t count) {
        T* const piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += divide_up(count * int64_t(sizeof(T)), 256) * 256;
        return piece;
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

// Divides the workspace; returns the bytes it takes.
int64_t place(Routing& p, RoutingOp op, void* workspace) {
    Pieces pieces(workspace);
    p.total_v = pieces.take<float>(p.iterations * p.capsules());
    p.partial = pieces.take<float>(p.splits * p.capsules());
    if (p.backward) {
        p.grad_s = pieces.take<float>(p.iterations * p.capsules());
        p.grad_total_v = pieces.take<float>(p.capsules());
    }
    if (op == RoutingOp::couplings) p.s = pieces.take<float>(p.iterations * p.capsules());
    p.softmax = pieces.take<Softmax>((p.backward ? p.iterations : 1) * p.B * p.I);
    return pieces.used();
}

Routing plan(RoutingOp op, const RoutingCall& call, const Device& device) {
    Routing p = parameters(op, call);
    p.splits = general_splits(p, device);
    return p;
}

void forward(Routing p, int passes, Storage storage, Stream stream) {
    for (p.t = 0; p.t < passes; ++p.t) {
        general_sums(p, storage, stream);
        with_storage(storage, [&](auto type) {
            for_capsules(finish_forward_kernel<decltype(type)>, "finish_forward", p, stream);
        });
    }
}

void backward(Routing p, Storage storage, Stream stream) {
    with_storage(storage, [&](auto type) {
        for_capsules(begin_backward_kernel<decltype(type)>, "begin_backward", p, stream);
    });
    p.t = p.iterations - 1;
    if (p.detach && p.t > 0) general_softmax(p, storage, stream);
    for (; !p.detach && p.t > 0; --p.t) {
        general_sums(p, storage, stream);
        for_capsules(finish_backward_kernel, "finish_backward", p, stream);
    }
    general_gradients(p, storage, stream);
    with_storage(storage, [&](auto type) {
        const Launch how{"grad_bias", blocks_for(p.J * p.D, warp_size), threads,
                         threads * int64_t(sizeof(float)), stream};
        launch(grad_bias_kernel<decltype(type)>, how, p);
    });
}

}  // namespace

int64_t routing_workspace(RoutingOp op, const RoutingCall& call, const Device& device) {
    Routing p = plan(op, call, device);
    return place(p, op, nullptr);
}

void routing(RoutingOp op, const RoutingCall& call, const Device& device, Stream stream) {
    Routing p = plan(op, call, device);
    place(p, op, call.workspace);
    if (op == RoutingOp::backward) return backward(p, call.storage, stream);
    forward(p, op == RoutingOp::forward ? p.iterations : p.iterations - 1, call.storage, stream);
    if (op == RoutingOp::couplings) {
        p.t = p.iterations - 1;
        general_couplings(p, call.storage, stream);
    }
}

}  // namespace capsops
