// Launches routing: plan, workspace, the passes in their order, the gradients.
#include "common/arena.h"
#include "fused.h"
#include "routing.h"
#include "routing_general.h"
#include "smem_cached.h"

namespace capsops {
namespace {

constexpr int threads = 256;

template <typename S>
CAPSOPS_KERNEL(threads, 2)
finish_forward_kernel(CAPSOPS_PARAMETER Routing p) {
    finish_forward<S>(p, p.t);
}

template <typename S>
CAPSOPS_KERNEL(threads, 2)
begin_backward_kernel(CAPSOPS_PARAMETER Routing p) {
    begin_backward<S>(p);
}

CAPSOPS_KERNEL(threads, 2)
finish_backward_kernel(CAPSOPS_PARAMETER Routing p) { finish_backward(p, p.t); }

// dbias = sum over passes and batch of ds. Lanes are along [J, D]; the warps of a block share the rows.
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
    p.u = call.u, p.weight = call.weight, p.bias = call.bias, p.v = call.v;
    p.s = static_cast<float*>(call.s);
    p.couplings = call.couplings, p.grad = call.grad;
    p.grad_u = call.grad_u, p.grad_weight = call.grad_weight, p.grad_bias = call.grad_bias;
    p.B = call.B, p.I = call.I, p.J = call.J, p.D = call.D, p.K = call.K;
    p.iterations = int(call.iterations < 1 ? 1 : call.iterations);
    p.first = call.iterations == 0 ? 1.0f : 1.0f / float(call.J + call.leaky);
    p.leaky = call.leaky, p.detach = call.detach, p.backward = op == RoutingOp::backward;
    return p;
}

// to = the sum of `parts` arrays of `count` numbers.
struct Parts {
    const float* from;
    void* to;
    int64_t count, parts;
};

template <typename S>
CAPSOPS_KERNEL(threads, 4)
add_parts_kernel(Parts p) {
    for (int64_t n = block_index() * threads + thread_index(); n < p.count; n += block_count() * threads) {
        float sum = 0.0f;
#pragma unroll 4
        for (int64_t part = 0; part < p.parts; ++part) sum += p.from[part * p.count + n];
        narrow(sum, static_cast<S*>(p.to)[n]);
    }
}

void add_parts(const float* from, void* to, int64_t count, int64_t parts, Dtype dtype, Stream stream) {
    with_dtype(dtype, [&](auto type) {
        launch(add_parts_kernel<decltype(type)>,
               Launch{"add_parts", blocks_for(count, threads), threads, 0, stream},
               Parts{from, to, count, parts});
    });
}

// How a call is computed: by the smem_cached or the fused kernels if they support the shape, else by the
// general ones.
struct Plan {
    Fused passes, gradients;
    FusedKernels kernels;
    SmemCachedTiling smem_cached_tiling;
    bool fused_passes, fused_gradients, smem_cached;
    bool statistics;  // backward: the sums of the softmax of all passes go through memory
    int64_t blocks;   // of the passes: at most as many as can be resident on the device
};

Plan make_plan(RoutingOp op, const RoutingCall& call, const RoutingMode& mode, const Device& device) {
    Plan plan{};
    Fused& passes = plan.passes;
    passes.p = parameters(op, call);
    passes.couplings = op == RoutingOp::couplings;
    const int element = call.dtype == Dtype::float32 ? 4 : 2;
    const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
    const bool precomputed = call.weight == nullptr;
    passes.vectors = (precomputed ? call.D : call.K) * element % 16 == 0 && aligned(call.u) &&
                     aligned(call.weight) && (!precomputed || aligned(call.grad_u));
    const int last = passes.p.iterations - 1, logits = call.detach ? last > 0 : last;
    const bool tensor_cores = !precomputed && (element == 2 || mode.tf32);
    const FusedShape shape{call.B,  call.I,       call.J,      call.D, call.K,
                           element, tensor_cores, precomputed, logits};
    const FusedLimits limits{device.multiprocessors, device.shared_per_block};
    plan.smem_cached = op == RoutingOp::forward && plan_smem_cached(shape, limits, plan.smem_cached_tiling);
    if (plan.smem_cached) return plan;
    plan.fused_passes = plan_passes(shape, limits, 1, passes.tiling);
    if (!plan.fused_passes) {
        passes.p.splits = general_splits(passes.p, device);
        plan.gradients = passes;
        plan.statistics = true;
        return plan;
    }
    const auto choose = call.dtype == Dtype::bfloat16  ? fused_bfloat16
                        : call.dtype == Dtype::float16 ? fused_float16
                        : mode.tf32                    ? fused_tf32
                                                       : fused_float32;
    plan.kernels = precomputed ? fused_precomputed(call.dtype, passes.tiling, passes.p.backward, logits)
                               : choose(passes.tiling, passes.p.backward, logits);
    const auto blocks_per_multiprocessor = [&] {
        const Tiling& tiling = passes.tiling;
        return resident_blocks(plan.kernels.passes, "routing passes", tiling.warps * warp_size,
                               tiling.shared);
    };
    plan_passes(shape, limits, blocks_per_multiprocessor(), passes.tiling);
    const int64_t resident = int64_t(device.multiprocessors) * blocks_per_multiprocessor();
    plan.blocks = passes.tiling.items < resident ? passes.tiling.items : resident;
    passes.p.splits = passes.tiling.splits;
    plan.gradients = passes;
    plan.fused_gradients = passes.p.backward && plan_gradients(shape, limits, plan.gradients.tiling);
    plan.statistics = passes.tiling.tiles_j > 1 || !plan.fused_gradients || plan.gradients.tiling.tiles_j > 1;
    return plan;
}

// Divides the workspace and returns its bytes. If `workspace` is null, it is only measured.
int64_t place(Plan& plan, RoutingOp op, void* workspace) {
    AlignedArena<256> arena(workspace);
    if (plan.smem_cached) return 0;
    Routing& p = plan.passes.p;
    p.total_v = arena.take<float>(p.iterations * p.capsules());
    p.partial = arena.take<float>(p.splits * p.capsules());
    if (p.backward) {
        p.grad_s = arena.take<float>(p.iterations * p.capsules());
        p.grad_total_v = arena.take<float>(p.capsules());
    }
    if (op == RoutingOp::couplings) p.s = arena.take<float>(p.iterations * p.capsules());
    if (p.backward ? plan.statistics : !plan.fused_passes || plan.passes.tiling.tiles_j > 1) {
        p.softmax = arena.take<Softmax>((p.backward ? p.iterations - 1 : 1) * p.B * p.I);
    }
    Fused& gradients = plan.gradients;
    gradients.p = p;
    if (plan.fused_gradients && p.grad_weight != nullptr && gradients.tiling.splits > 1) {
        gradients.partial_w = arena.take<float>(gradients.tiling.splits * p.I * p.J * p.D * p.K);
    }
    if (plan.fused_gradients && p.weight != nullptr && p.grad_u != nullptr && gradients.tiling.tiles_j > 1) {
        gradients.partial_u = arena.take<float>(gradients.tiling.tiles_j * p.B * p.I * p.K);
    }
    return arena.used();
}

// Steps first ... last - 1 of the sequence: in one launch if it can be cooperative, else in a launch for each
// step.
void launch_passes(const Plan& plan, int first, int last, bool cooperative, Stream stream) {
    Fused f = plan.passes;
    Launch config{f.p.backward ? "routing_backward_passes" : "routing_passes",
                  plan.blocks,
                  f.tiling.warps * warp_size,
                  f.tiling.shared,
                  stream,
                  cooperative && last - first > 1};
    const int stride = config.cooperative ? last - first : 1;
    for (int step = first; step < last; step += stride) {
        f.first_step = step, f.last_step = step + stride;
        launch(plan.kernels.passes, config, f);
    }
}

void forward(const Plan& plan, RoutingOp op, const RoutingCall& call, bool cooperative, Stream stream) {
    Routing p = plan.passes.p;
    const bool couplings = op == RoutingOp::couplings;
    if (plan.smem_cached) {
        smem_cached_passes(SmemCached{p, plan.smem_cached_tiling, plan.passes.vectors}, call.dtype, stream);
        return;
    }
    if (plan.fused_passes) {
        const int steps_per_pass = plan.passes.tiling.tiles_j > 1 ? 3 : 2;
        launch_passes(plan, 0, steps_per_pass * p.iterations - couplings, cooperative, stream);
        return;
    }
    for (p.t = 0; p.t < p.iterations - couplings; ++p.t) {
        general_sums(p, call.dtype, stream);
        with_dtype(call.dtype, [&](auto type) {
            for_capsules(finish_forward_kernel<decltype(type)>, "finish_forward", p, stream);
        });
    }
    if (couplings) general_couplings(p, call.dtype, stream);
}

void backward_passes(const Plan& plan, const RoutingCall& call, bool cooperative, Stream stream) {
    Routing p = plan.passes.p;
    if (plan.fused_passes) {
        const int steps_per_pass = plan.passes.tiling.tiles_j > 1 ? 3 : 2, logits = p.iterations - 1;
        launch_passes(plan, 0, 1 + (p.detach ? plan.statistics && logits > 0 : logits * steps_per_pass),
                      cooperative, stream);
        return;
    }
    with_dtype(call.dtype, [&](auto type) {
        for_capsules(begin_backward_kernel<decltype(type)>, "begin_backward", p, stream);
    });
    p.t = p.iterations - 1;
    if (p.detach && p.t > 0) general_softmax(p, call.dtype, stream);
    for (; !p.detach && p.t > 0; --p.t) {
        general_sums(p, call.dtype, stream);
        for_capsules(finish_backward_kernel, "finish_backward", p, stream);
    }
}

void gradients(const Plan& plan, const RoutingCall& call, Stream stream) {
    const Fused& f = plan.gradients;
    const Routing& p = f.p;
    if (!plan.fused_gradients) {
        general_gradients(p, call.dtype, stream);
    } else if (p.grad_u != nullptr || p.grad_weight != nullptr) {
        const Launch config{"routing_gradients", blocks_for(f.tiling.items, 1), f.tiling.warps * warp_size,
                            f.tiling.shared, stream};
        launch(plan.kernels.gradients, config, f);
        if (f.partial_w != nullptr) {
            const int64_t count = p.I * p.J * p.D * p.K;
            add_parts(f.partial_w, p.grad_weight, count, f.tiling.splits, call.dtype, stream);
        }
        if (f.partial_u != nullptr) {
            const int64_t count = p.B * p.I * p.K;
            add_parts(f.partial_u, p.grad_u, count, f.tiling.tiles_j, call.dtype, stream);
        }
    }
    with_dtype(call.dtype, [&](auto type) {
        const Launch config{"grad_bias", blocks_for(p.J * p.D, warp_size), threads,
                            threads * int64_t(sizeof(float)), stream};
        launch(grad_bias_kernel<decltype(type)>, config, p);
    });
}

}  // namespace

int64_t routing_workspace(RoutingOp op, const RoutingCall& call, const RoutingMode& mode,
                          const Device& device) {
    Plan plan = make_plan(op, call, mode, device);
    return place(plan, op, nullptr);
}

void routing(RoutingOp op, const RoutingCall& call, const RoutingMode& mode, void* workspace,
             const Device& device, Stream stream) {
    Plan plan = make_plan(op, call, mode, device);
    place(plan, op, workspace);
    const bool cooperative = mode.cooperative && device.cooperative;
    if (op == RoutingOp::backward) {
        backward_passes(plan, call, cooperative, stream);
        gradients(plan, call, stream);
    } else {
        forward(plan, op, call, cooperative, stream);
    }
}

}  // namespace capsops
