// Launches routing: plan, workspace, the passes in their order, the gradients.
#include "common/arena.h"
#include "fused.h"
#include "operands.h"
#include "passes_host.h"
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
    Passes product_passes;
    PassKernel pass_kernel;    // null if the passes are others
    int64_t u_words, w_words;  // of the arranged operands
    SmemCachedTiling smem_cached_tiling;
    bool precomputed_passes, fused_gradients, smem_cached;
    bool statistics;  // backward: the sums of the softmax of all passes go through memory
    int64_t blocks;   // of the passes: at most as many as can be resident on the device
};

template <typename Math>
PassShape pass_shape(const RoutingCall& call, bool backward) {
    return {call.B, call.I, call.J, call.D, call.K, Math::depth, Math::w_quads, Math::u_words, backward};
}

// Plans the passes over u and W. Returns false if they do not support the shape.
bool plan_product_passes(const RoutingCall& call, const RoutingMode& mode, const Device& device,
                         const FusedLimits& limits, Plan& plan) {
    Passes& passes = plan.product_passes;
    PassTiling& tiling = passes.tiling;
    const bool backward = plan.passes.p.backward,
               shallow = call.K <= ShallowSixteenBitProducts<Float16>::depth;
    const PassShape shape = call.dtype == Dtype::float32
                                ? (mode.tf32 ? pass_shape<Tf32Products>(call, backward)
                                             : pass_shape<Float32Products>(call, backward))
                            : shallow ? pass_shape<ShallowSixteenBitProducts<Float16>>(call, backward)
                                      : pass_shape<SixteenBitProducts<Float16>>(call, backward);
    if (!plan_pass_tiles(shape, limits, tiling)) return false;
    if (call.dtype == Dtype::float32) {
        const auto choose = backward ? (mode.tf32 ? pass_kernel_backward_tf32 : pass_kernel_backward_float32)
                                     : (mode.tf32 ? pass_kernel_tf32 : pass_kernel_float32);
        plan.pass_kernel = choose(tiling);
    } else {
        const bool bfloat16 = call.dtype == Dtype::bfloat16;
        const auto choose = backward
                                ? (bfloat16 ? pass_kernel_backward_bfloat16 : pass_kernel_backward_float16)
                                : (bfloat16 ? pass_kernel_bfloat16 : pass_kernel_float16);
        plan.pass_kernel = choose(tiling, shallow);
    }
    const char* const name = backward ? "routing_backward_passes" : "routing_passes";
    Launch config{name, 0, tiling.groups * tiling.m_tiles * warp_size, tiling.shared, Stream()};
    int clusters[4] = {};
    clusters[0] =
        device.multiprocessors * resident_blocks(plan.pass_kernel, name, config.threads, config.shared);
    for (int n = 1; n < 4 && device.clusters; ++n) {
        config.cluster = 1 << n, config.blocks = config.cluster;
        clusters[n] = resident_clusters(plan.pass_kernel, config);
    }
    divide_input_capsules(shape, clusters, tiling);
    int largest = 0;
    while (1 << largest < tiling.cluster) ++largest;
    plan.blocks = tiling.cluster * smaller(tiling.items, clusters[largest]);
    plan.u_words = call.I * tiling.tiles_b * tiling.m_tiles * tiling.steps * shape.u_words * warp_size;
    plan.w_words = call.I * tiling.tiles_j * tiling.steps *
                   (tiling.n * capsules_of_warp(tiling.n, tiling.few) / 4) * shape.w_quads * 4 * warp_size;
    passes.couplings = plan.passes.couplings;
    return true;
}

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
    const auto choose_gradients = [&] {
        plan.gradients = passes;
        plan.fused_gradients = passes.p.backward && plan_gradients(shape, limits, plan.gradients.tiling);
        const int64_t tiles_j = plan.pass_kernel ? plan.product_passes.tiling.tiles_j : passes.tiling.tiles_j;
        plan.statistics = tiles_j > 1 || !plan.fused_gradients || plan.gradients.tiling.tiles_j > 1;
    };
    if (!precomputed && plan_product_passes(call, mode, device, limits, plan)) {
        passes.p.splits = plan.product_passes.tiling.splits;
        choose_gradients();
        if (plan.fused_gradients) {
            const auto choose = call.dtype == Dtype::bfloat16  ? fused_bfloat16
                                : call.dtype == Dtype::float16 ? fused_float16
                                : mode.tf32                    ? fused_tf32
                                                               : fused_float32;
            plan.kernels = choose(plan.gradients.tiling, true, logits);
        }
        return plan;
    }
    plan.precomputed_passes = precomputed && plan_precomputed_passes(shape, limits, 1, passes.tiling);
    if (!plan.precomputed_passes) {
        passes.p.splits = general_splits(passes.p, device);
        plan.gradients = passes;
        plan.statistics = true;
        return plan;
    }
    plan.kernels = fused_precomputed(call.dtype, passes.tiling, passes.p.backward, logits);
    const auto blocks_per_multiprocessor = [&] {
        const Tiling& tiling = passes.tiling;
        return resident_blocks(plan.kernels.passes, "routing passes", tiling.warps * warp_size,
                               tiling.shared);
    };
    plan_precomputed_passes(shape, limits, blocks_per_multiprocessor(), passes.tiling);
    const int64_t resident = int64_t(device.multiprocessors) * blocks_per_multiprocessor();
    plan.blocks = passes.tiling.items < resident ? passes.tiling.items : resident;
    passes.p.splits = passes.tiling.splits;
    choose_gradients();
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
    const bool general = !plan.precomputed_passes && !plan.pass_kernel;
    if (p.backward ? plan.statistics : general || plan.passes.tiling.tiles_j > 1) {
        p.softmax = arena.take<Softmax>((p.backward ? p.iterations - 1 : 1) * p.B * p.I);
    }
    if (plan.pass_kernel) {
        Passes& passes = plan.product_passes;
        const PassTiling& tiling = passes.tiling;
        Arranged& arranged = p.arranged;
        arranged.n = tiling.n, arranged.tile_j = tiling.tile_j, arranged.tiles_j = int(tiling.tiles_j);
        arranged.tiles = tiling.n * capsules_of_warp(tiling.n, tiling.few);
        arranged.tiles_b = int(tiling.tiles_b) * tiling.m_tiles;
        arranged.numbers = int64_t(p.iterations) * arranged.tiles_b * arranged.tiles_j * arranged.tiles * 128;
        arranged.v = arena.take<float>(arranged.numbers);
        if (p.backward) arranged.grad_s = arena.take<float>(arranged.numbers);
        passes.p = p;
        passes.u = arena.take<uint32_t>(plan.u_words);
        passes.weight = arena.take<uint32_t>(plan.w_words);
        if (passes.tiling.tiles_j > 1)
            passes.tile_softmax = arena.take<Softmax>(passes.tiling.tiles_j * p.I * p.B);
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

void launch_product_passes(const Plan& plan, int steps, bool cooperative, Stream stream) {
    Passes f = plan.product_passes;
    Launch config{f.p.backward ? "routing_backward_passes" : "routing_passes",
                  plan.blocks,
                  f.tiling.groups * f.tiling.m_tiles * warp_size,
                  f.tiling.shared,
                  stream,
                  cooperative && steps > 1,
                  f.tiling.cluster};
    f.prepares = steps > 1;
    const int stride = config.cooperative ? steps : 1;
    for (int step = 0; step < steps; step += stride) {
        f.first_step = step, f.last_step = step + stride;
        launch(plan.pass_kernel, config, f);
    }
}

void forward(const Plan& plan, RoutingOp op, const RoutingCall& call, bool cooperative, Stream stream) {
    Routing p = plan.passes.p;
    const bool couplings = op == RoutingOp::couplings;
    if (plan.smem_cached) {
        smem_cached_passes(SmemCached{p, plan.smem_cached_tiling, plan.passes.vectors}, call.dtype, stream);
        return;
    }
    if (plan.pass_kernel) {
        const int steps_per_pass = plan.product_passes.tiling.tiles_j > 1 ? 3 : 2;
        launch_product_passes(plan, 1 + steps_per_pass * p.iterations - couplings, cooperative, stream);
        return;
    }
    if (plan.precomputed_passes) {
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
    if (plan.pass_kernel) {
        const int tiled = plan.product_passes.tiling.tiles_j > 1, logits = p.iterations - 1;
        const int steps = p.detach ? (plan.statistics && logits > 0 ? 1 + tiled : 0) : logits * (tiled + 2);
        launch_product_passes(plan, 1 + steps, cooperative, stream);
        return;
    }
    if (plan.precomputed_passes) {
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
