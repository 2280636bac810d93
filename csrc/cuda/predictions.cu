// Predictions u_hat_ij = W_ij u_i and their gradients.
#include "kernels.h"

namespace capsops {
namespace {

constexpr int threads = 256;
constexpr int depth = 8;    // components of an input capsule that are kept in registers
constexpr int samples = 4;  // of the batch that share each number read from W

struct Parameters {
    const void* u;
    const void* weight;
    const void* grad;
    void* out;
    int64_t B, I, R, K;  // R = J D rows of W_i
    int64_t chunk;       // samples per thread
};

// A thread has one row of W and loops over samples of the batch.
template <typename S>
CAPSOPS_KERNEL(threads, 4)
predictions_kernel(Parameters p) {
    const int64_t rows = p.I * p.R, chunks = divide_up(p.B, p.chunk);
    for (int64_t n = block_index() * threads + thread_index(); n < rows * chunks;
         n += block_count() * threads) {
        const int64_t row = n % rows, i = row / p.R, begin = n / rows * p.chunk;
        const int64_t end = begin + p.chunk < p.B ? begin + p.chunk : p.B;
        float w[depth];
#pragma unroll
        for (int k = 0; k < depth; ++k) w[k] = k < p.K ? load<S>(p.weight, row * p.K + k) : 0.0f;
        for (int64_t b = begin; b < end; ++b) {
            const int64_t u = (b * p.I + i) * p.K;
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < depth; ++k) {
                if (k < p.K) sum += w[k] * load<S>(p.u, u + k);
            }
            for (int64_t k = depth; k < p.K; ++k)
                sum += load<S>(p.weight, row * p.K + k) * load<S>(p.u, u + k);
            narrow(sum, static_cast<S*>(p.out)[b * rows + row]);
        }
    }
}

// A warp sums over the rows of W_i, for some samples and `depth` components of u_i.
template <typename S>
CAPSOPS_KERNEL(threads, 2)
grad_u_kernel(Parameters p) {
    const int64_t blocks = divide_up(p.K, depth), groups = divide_up(p.B, samples);
    const int64_t warps = block_count() * (threads / warp_size);
    for (int64_t n = block_index() * (threads / warp_size) + warp_index(); n < groups * p.I * blocks;
         n += warps) {
        const int64_t first = n % blocks * depth, i = n / blocks % p.I, b = n / blocks / p.I * samples;
        float sum[samples][depth] = {};
        for (int64_t row = lane_index(); row < p.R; row += warp_size) {
            float w[depth];
#pragma unroll
            for (int k = 0; k < depth; ++k) {
                w[k] = first + k < p.K ? load<S>(p.weight, (i * p.R + row) * p.K + first + k) : 0.0f;
            }
#pragma unroll
            for (int m = 0; m < samples; ++m) {
                if (b + m >= p.B) continue;
                const float g = load<S>(p.grad, ((b + m) * p.I + i) * p.R + row);
#pragma unroll
                for (int k = 0; k < depth; ++k) {
                    if (first + k < p.K) sum[m][k] += g * w[k];
                }
            }
        }
#pragma unroll
        for (int m = 0; m < samples; ++m) {
#pragma unroll
            for (int k = 0; k < depth; ++k) {
                const float total = lane_sum(sum[m][k]);
                if (lane_index() == 0 && b + m < p.B && first + k < p.K) {
                    narrow(total, static_cast<S*>(p.out)[((b + m) * p.I + i) * p.K + first + k]);
                }
            }
        }
    }
}

// A thread sums over the batch, for one row of W and `depth` of its components.
template <typename S>
CAPSOPS_KERNEL(threads, 4)
grad_weight_kernel(Parameters p) {
    const int64_t rows = p.I * p.R, blocks = divide_up(p.K, depth);
    for (int64_t n = block_index() * threads + thread_index(); n < rows * blocks;
         n += block_count() * threads) {
        const int64_t row = n % rows, i = row / p.R, first = n / rows * depth;
        float sum[depth] = {};
        for (int64_t b = 0; b < p.B; ++b) {
            const float g = load<S>(p.grad, b * rows + row);
#pragma unroll
            for (int k = 0; k < depth; ++k) {
                if (first + k < p.K) sum[k] += g * load<S>(p.u, (b * p.I + i) * p.K + first + k);
            }
        }
#pragma unroll
        for (int k = 0; k < depth; ++k) {
            if (first + k < p.K) narrow(sum[k], static_cast<S*>(p.out)[row * p.K + first + k]);
        }
    }
}

}  // namespace

void predictions(const PredictionsCall& call, const Device& device, Stream stream) {
    Parameters p{call.u, call.weight, nullptr, call.u_hat, call.B, call.I, call.J * call.D, call.K, 1};
    // With longer chunks of the batch W is read less often, but there must be enough chunks to fill the
    // device.
    while (p.chunk < 32 && p.I * p.R * (call.B / p.chunk) > int64_t(device.multiprocessors) * 4096)
        p.chunk *= 2;
    const int64_t work = p.I * p.R * divide_up(call.B, p.chunk);
    with_dtype(call.dtype, [&](auto type) {
        launch(predictions_kernel<decltype(type)>,
               Launch{"predictions", blocks_for(work, threads), threads, 0, stream}, p);
    });
}

void predictions_backward(const PredictionsCall& call, const Device&, Stream stream) {
    Parameters p{call.u, call.weight, call.grad, call.grad_u, call.B, call.I, call.J * call.D, call.K, 1};
    const int64_t blocks = divide_up(call.K, depth);
    with_dtype(call.dtype, [&](auto type) {
        typedef decltype(type) S;
        if (call.grad_u != nullptr) {
            const int64_t warps = divide_up(call.B, samples) * call.I * blocks;
            launch(grad_u_kernel<S>,
                   Launch{"predictions_grad_u", blocks_for(warps, threads / warp_size), threads, 0, stream},
                   p);
        }
        if (call.grad_weight != nullptr) {
            p.out = call.grad_weight;
            launch(grad_weight_kernel<S>,
                   Launch{"predictions_grad_weight", blocks_for(p.I * p.R * blocks, threads), threads, 0,
                          stream},
                   p);
        }
    });
}

}  // namespace capsops
