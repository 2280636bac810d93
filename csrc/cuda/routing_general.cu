#include "routing_general.h"

namespace capsops {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / warp_size;

template <typename S>
CAPSOPS_DEVICE float prediction(const Routing& p, int64_t b, int64_t i, int64_t j, int64_t d) {
    if (p.weight == nullptr) return load<S>(p.u, ((b * p.I + i) * p.J + j) * p.D + d);
    const int64_t u = (b * p.I + i) * p.K, w = ((i * p.J + j) * p.D + d) * p.K;
    float sum = 0.0f;
    for (int64_t k = 0; k < p.K; ++k) sum += load<S>(p.u, u + k) * load<S>(p.weight, w + k);
    return sum;
}

// The logit u_hat . V and, backward, a = u_hat . ds of one (b, i, j) in pass t, computed by a warp; all lanes
// receive them.
struct Agreement {
    float logit, a;
};

template <typename S>
CAPSOPS_DEVICE Agreement agreement(const Routing& p, int t, int64_t b, int64_t i, int64_t j) {
    const int64_t at = t * p.capsules() + (b * p.J + j) * p.D;
    float logit = 0.0f, a = 0.0f;
    for (int64_t d = lane_index(); d < p.D; d += warp_size) {
        const float u_hat = prediction<S>(p, b, i, j, d);
        logit += u_hat * p.total_v[at + d];
        if (p.backward) a += u_hat * p.grad_s[at + d];
    }
    return {lane_sum(logit), p.backward ? lane_sum(a) : 0.0f};
}

// What multiplies u_hat in the sum of pass t: c forward, db backward.
template <typename S>
CAPSOPS_DEVICE float coefficient(const Routing& p, int64_t b, int64_t i, int64_t j) {
    if (p.t == 0) return p.first;
    const Softmax softmax = p.softmax[p.softmax_at(p.t, b, i)];
    const Agreement x = agreement<S>(p, p.t, b, i, j);
    const float c = coupling(softmax, x.logit);
    return p.backward ? c * (x.a - softmax.mean) : c;
}

template <typename S>
CAPSOPS_KERNEL(threads, 2)
softmax_kernel(Routing p) {
    for_warps(p.B * p.I, [&](int64_t n) {
        const int64_t b = n / p.I, i = n % p.I;
        float largest = p.leaky ? 0.0f : -INFINITY, sum = p.leaky ? 1.0f : 0.0f, mean = 0.0f;
        for (int64_t j = 0; j < p.J; ++j) {
            const Agreement x = agreement<S>(p, p.t, b, i, j);
            const float before = largest;
            largest = fmaxf(largest, x.logit);
            const float shrink = before == largest ? 1.0f : expf(before - largest);
            const float e = expf(x.logit - largest);
            sum = sum * shrink + e;
            mean = mean * shrink + e * x.a;
        }
        if (lane_index() == 0) p.softmax[p.softmax_at(p.t, b, i)] = {largest, sum, mean / sum};
    });
}

// A warp sums over one split of i, for one (b, j) and 32 of its components.
template <typename S>
CAPSOPS_KERNEL(threads, 2)
sums_kernel(Routing p) {
    const int64_t blocks = divide_up(p.D, warp_size), length = divide_up(p.I, p.splits);
    for_warps(p.splits * p.B * p.J * blocks, [&](int64_t n) {
        const int64_t d = n % blocks * warp_size + lane_index(), j = n / blocks % p.J;
        const int64_t b = n / blocks / p.J % p.B, split = n / blocks / p.J / p.B;
        const int64_t end = (split + 1) * length < p.I ? (split + 1) * length : p.I;
        float sum = 0.0f;
        for (int64_t i = split * length; i < end; ++i) {
            const float c = coefficient<S>(p, b, i, j);
            if (d < p.D) sum += c * prediction<S>(p, b, i, j, d);
        }
        if (d < p.D) p.partial[split * p.capsules() + (b * p.J + j) * p.D + d] = sum;
    });
}

template <typename S>
CAPSOPS_KERNEL(threads, 2)
couplings_kernel(Routing p) {
    for_warps(p.B * p.I * p.J, [&](int64_t n) {
        const int64_t j = n % p.J, i = n / p.J % p.I, b = n / p.J / p.I;
        const float c = coefficient<S>(p, b, i, j);
        if (lane_index() == 0) narrow(c, static_cast<S*>(p.couplings)[n]);
    });
}

// The gradient of u_hat_ij is sum_t c ds + db V. The factors of one pass for one (b, i, j).
struct Factors {
    float c, grad_b;
};

template <typename S>
CAPSOPS_DEVICE Factors factors(const Routing& p, int t, int64_t b, int64_t i, int64_t j) {
    if (t == 0) return {p.first, 0.0f};
    const Softmax softmax = p.softmax[p.softmax_at(t, b, i)];
    const Agreement x = agreement<S>(p, t, b, i, j);
    const float c = coupling(softmax, x.logit);
    return {c, p.detach ? 0.0f : c * (x.a - softmax.mean)};
}

// Calls function(d, component d of the gradient of u_hat_ij), with 32 components in the lanes of a warp at a
// time. Lanes beyond D have d >= D and 0.
template <typename S, typename Function>
CAPSOPS_DEVICE void for_gradient(const Routing& p, int64_t b, int64_t i, int64_t j, int64_t begin,
                                 int64_t end, Function function) {
    for (int64_t base = begin; base < end; base += warp_size) {
        const int64_t d = base + lane_index(), at = (b * p.J + j) * p.D + d;
        float sum = 0.0f;
        for (int t = p.detach ? p.iterations - 1 : 0; t < p.iterations; ++t) {
            const Factors f = factors<S>(p, t, b, i, j);
            if (d >= p.D) continue;
            sum += f.c * p.grad_s[t * p.capsules() + at];
            if (t > 0 && !p.detach) sum += f.grad_b * p.total_v[t * p.capsules() + at];
        }
        function(d, sum);
    }
}

template <typename S>
CAPSOPS_KERNEL(threads, 2)
grad_predictions_kernel(Routing p) {
    for_warps(p.B * p.I * p.J, [&](int64_t n) {
        const int64_t j = n % p.J, i = n / p.J % p.I, b = n / p.J / p.I;
        for_gradient<S>(p, b, i, j, 0, p.D, [&](int64_t d, float grad) {
            if (d < p.D) narrow(grad, static_cast<S*>(p.grad_u)[n * p.D + d]);
        });
    });
}

// A warp computes 32 components of du_i of one sample.
template <typename S>
CAPSOPS_KERNEL(threads, 2)
grad_u_kernel(Routing p) {
    const int64_t blocks = divide_up(p.K, warp_size);
    for_warps(p.B * p.I * blocks, [&](int64_t n) {
        const int64_t k = n % blocks * warp_size + lane_index(), i = n / blocks % p.I, b = n / blocks / p.I;
        float sum = 0.0f;
        for (int64_t j = 0; j < p.J; ++j) {
            for_gradient<S>(p, b, i, j, 0, p.D, [&](int64_t d, float grad) {
                const int64_t base = d - lane_index();
                float part = 0.0f;
                for (int lane = 0; lane < warp_size && base + lane < p.D; ++lane) {
                    const float g = shuffle(grad, lane);
                    if (k < p.K) {
                        part += g * load<S>(p.weight, ((i * p.J + j) * p.D + base + lane) * p.K + k);
                    }
                }
                sum += part;
            });
        }
        if (k < p.K) narrow(sum, static_cast<S*>(p.grad_u)[(b * p.I + i) * p.K + k]);
    });
}

// A warp computes 32 rows of dW_ij, `depth` components in each.
template <typename S>
CAPSOPS_KERNEL(threads, 2)
grad_weight_kernel(Routing p) {
    constexpr int depth = 8;
    const int64_t blocks = divide_up(p.D, warp_size), depths = divide_up(p.K, depth);
    for_warps(p.I * p.J * blocks * depths, [&](int64_t n) {
        const int64_t first = n % depths * depth, begin = n / depths % blocks * warp_size;
        const int64_t j = n / depths / blocks % p.J, i = n / depths / blocks / p.J;
        float sum[depth] = {};
        for (int64_t b = 0; b < p.B; ++b) {
            for_gradient<S>(p, b, i, j, begin, begin + 1, [&](int64_t, float grad) {
#pragma unroll
                for (int k = 0; k < depth; ++k) {
                    if (first + k < p.K) sum[k] += grad * load<S>(p.u, (b * p.I + i) * p.K + first + k);
                }
            });
        }
        const int64_t d = begin + lane_index();
#pragma unroll
        for (int k = 0; k < depth; ++k) {
            if (d < p.D && first + k < p.K) {
                narrow(sum[k], static_cast<S*>(p.grad_weight)[((i * p.J + j) * p.D + d) * p.K + first + k]);
            }
        }
    });
}

void run(void (*kernel)(Routing), const char* name, const Routing& p, int64_t work, Stream stream) {
    launch(kernel, Launch{name, blocks_for(work, warps), threads, 0, stream}, p);
}

}  // namespace

int64_t general_splits(const Routing& p, const Device& device) {
    const int64_t target = int64_t(device.multiprocessors) * 4 * warps,
                  tasks = p.B * p.J * divide_up(p.D, warp_size);
    const int64_t splits = divide_up(target, tasks), length = divide_up(p.I, splits < p.I ? splits : p.I);
    return divide_up(p.I, length);
}

void general_softmax(const Routing& p, Dtype dtype, Stream stream) {
    with_dtype(dtype, [&](auto type) {
        run(softmax_kernel<decltype(type)>, "general_softmax", p, p.B * p.I, stream);
    });
}

void general_sums(const Routing& p, Dtype dtype, Stream stream) {
    if (p.t > 0) general_softmax(p, dtype, stream);
    const int64_t work = p.splits * p.B * p.J * divide_up(p.D, warp_size);
    with_dtype(dtype, [&](auto type) { run(sums_kernel<decltype(type)>, "general_sums", p, work, stream); });
}

void general_couplings(const Routing& p, Dtype dtype, Stream stream) {
    general_softmax(p, dtype, stream);
    with_dtype(dtype, [&](auto type) {
        run(couplings_kernel<decltype(type)>, "general_couplings", p, p.B * p.I * p.J, stream);
    });
}

void general_gradients(const Routing& p, Dtype dtype, Stream stream) {
    with_dtype(dtype, [&](auto type) {
        typedef decltype(type) S;
        if (p.weight == nullptr) {
            run(grad_predictions_kernel<S>, "general_grad_predictions", p, p.B * p.I * p.J, stream);
            return;
        }
        if (p.grad_u != nullptr) {
            run(grad_u_kernel<S>, "general_grad_u", p, p.B * p.I * divide_up(p.K, warp_size), stream);
        }
        if (p.grad_weight != nullptr) {
            const int64_t work = p.I * p.J * divide_up(p.D, warp_size) * divide_up(p.K, 8);
            run(grad_weight_kernel<S>, "general_grad_weight", p, work, stream);
        }
    });
}

}  // namespace capsops
