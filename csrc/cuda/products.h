// The small matrix products of routing, each by one warp: of float32 on tensor cores in TF32, or by
// multiply-adds. Those of 16-bit numbers are in products_16_bit.h.
//
// A tile is 16 samples of the batch x 8 components d of an output capsule, 4 numbers in each lane, in the
// layout of the tensor core's result: with g = lane / 4 and q = lane % 4, (g, 2q), (g, 2q + 1), (g + 8, 2q),
// (g + 8, 2q + 1). u [samples, stride] and W_ij [D, stride] are in shared memory, with k along the rows,
// padded with 0 to a multiple of 8. The stride is an odd multiple of 8, which avoids bank conflicts.
//
//   predict:  u_hat[b, d] += sum_k u[b, k] W[d, k]
//   grad_u:   du[b, k] += sum_d grad[b, d] W[d, k], for 8 components k, in the layout of a tile
//   grad_w:   dW[d, k] += sum_b grad[b, d] u[b, k], for 16 components d and 8 components k, 4 numbers in each
//   lane
#pragma once

#include "device.h"

namespace capsops {

typedef float Tile[4];

// Sums over the 4 lanes with the same g. x[r] belongs to row g + 8 r of M tiles; lane q receives the sum of
// x[q]. With M = 1 there are two rows, and lanes 2 and 3 receive the same as lanes 0 and 1.
template <int M>
CAPSOPS_DEVICE float quad_sum(const float (&x)[2 * M]) {
    const bool odd = lane_index() & 1;
    if constexpr (M == 1) {
        const float sum = (odd ? x[1] : x[0]) + shuffle_xor(odd ? x[0] : x[1], 1);
        return sum + shuffle_xor(sum, 2);
    } else {
        const bool high = lane_index() & 2;
        const float first = (high ? x[2] : x[0]) + shuffle_xor(high ? x[0] : x[2], 2);
        const float second = (high ? x[3] : x[1]) + shuffle_xor(high ? x[1] : x[3], 2);
        return (odd ? second : first) + shuffle_xor(odd ? first : second, 1);
    }
}

// Products with a gradient on tensor cores in TF32. 16-bit numbers are exact in TF32; float32 is rounded.
template <typename S>
struct Tf32Gradients {
    static CAPSOPS_DEVICE float operand(float x) { return sizeof(S) == 4 ? round_tf32(x) : x; }

    template <int M, int N>
    struct Operand {
        Tile x[M][N];
    };

    template <int M, int N>
    static CAPSOPS_DEVICE Operand<M, N> gradient(const Tile (&grad)[M][N]) {
        Operand<M, N> to;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) to.x[m][n][e] = round_tf32(grad[m][n][e]);
            }
        }
        return to;
    }

    // The numbers of a tile are already a left operand if d is in the order 0 2 4 6 1 3 5 7.
    template <int M, int N>
    static CAPSOPS_DEVICE void grad_u(Tile& out, const Operand<M, N>& grad, int m, const S* w, int stride) {
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const Tile& x = grad.x[m][n];
            const float a[4] = {x[0], x[2], x[1], x[3]};
            const float b[2] = {operand(widen(w[(8 * n + 2 * q) * stride + g])),
                                operand(widen(w[(8 * n + 2 * q + 1) * stride + g]))};
            mma_tf32(out, a, b);
        }
    }

    // Transposes 8 samples x 8 components to the left operand of a product over the batch. Before, samples
    // are along g and components along q, the even ones in `even` and the odd ones in `odd`. In each of two
    // rounds a lane offers what the lane that reads from it needs.
    static CAPSOPS_DEVICE void transpose(float& first, float& second, float even, float odd) {
        const int g = lane_index() / 4, q = lane_index() % 4;
        const int source = 4 * q + g / 2;
        const bool upper = g >= 4, right = g & 1;
        const float one = shuffle(upper ? odd : even, right ? source + 16 : source);
        const float other = shuffle(upper ? even : odd, right ? source : source + 16);
        first = right ? other : one, second = right ? one : other;
    }

    template <int M>
    struct Transposed {
        float a[2 * M][4];
    };

    template <int M, int N>
    static CAPSOPS_DEVICE Transposed<M> transpose_gradient(const Operand<M, N>& grad, int pair) {
        Transposed<M> to;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const Tile& low = grad.x[r / 2][2 * pair];
            const int e = r % 2 * 2;
            transpose(to.a[r][0], to.a[r][2], low[e], low[e + 1]);
            to.a[r][1] = 0.0f, to.a[r][3] = 0.0f;
            if (2 * pair + 1 < N) {
                const Tile& high = grad.x[r / 2][N > 1 ? 2 * pair + 1 : 0];
                transpose(to.a[r][1], to.a[r][3], high[e], high[e + 1]);
            }
        }
        return to;
    }

    template <int M>
    static CAPSOPS_DEVICE void grad_w(Tile& out, const Transposed<M>& grad, const S* u, int stride) {
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const float b[2] = {operand(widen(u[(8 * r + q) * stride + g])),
                                operand(widen(u[(8 * r + q + 4) * stride + g]))};
            mma_tf32(out, grad.a[r], b);
        }
    }

    // The position of number e of grad_w's result in the 16 x 8 block of dW.
    static CAPSOPS_DEVICE int weight_d(int e) { return lane_index() / 4 + 8 * (e / 2); }
    static CAPSOPS_DEVICE int weight_k(int e) { return 2 * (lane_index() % 4) + e % 2; }
};

// On tensor cores, float32 rounded to TF32.
struct Tf32 : Tf32Gradients<float> {
    typedef float S;
    static constexpr bool tensor_cores = true, precomputed = false;

    // k is in the order 0 2 4 6 1 3 5 7, so that a lane's two numbers are neighbours in memory.
    template <int M, int N>
    static CAPSOPS_DEVICE void predict(Tile (&out)[M][N], const float* u, const float* w, int stride,
                                       int steps) {
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const int k = step * 8 + 2 * q;
            float b[N][2];
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float2 x = load_pair(w + (8 * n + g) * stride + k);
                b[n][0] = round_tf32(x.x), b[n][1] = round_tf32(x.y);
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const float2 low = load_pair(u + (16 * m + g) * stride + k);
                const float2 high = load_pair(u + (16 * m + 8 + g) * stride + k);
                float a[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    a[e] = round_tf32(a[e]);
                }
#pragma unroll
                for (int n = 0; n < N; ++n) mma_tf32(out[m][n], a, b[n]);
            }
        }
    }
};

// In float32, with the same layouts, so that the kernels are the same.
struct MultiplyAdds {
    typedef float S;
    static constexpr bool tensor_cores = false, precomputed = false;

    static CAPSOPS_DEVICE void quarter(float* to, const float* from) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }

    static CAPSOPS_DEVICE void row(float (&to)[8], const float* from) {
        quarter(to, from);
        quarter(to + 4, from + 4);
    }

    template <int M, int N>
    static CAPSOPS_DEVICE void predict(Tile (&out)[M][N], const float* u, const float* w, int stride,
                                       int steps) {
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll 1
        for (int first = 0; first < steps * 8; first += 4) {
            float a[2 * M][4];
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                quarter(a[r], u + (8 * r + g) * stride + first);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float b[4];
                    quarter(b, w + (8 * n + 2 * q + e) * stride + first);
#pragma unroll
                    for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
                        for (int k = 0; k < 4; ++k) out[r / 2][n][r % 2 * 2 + e] += a[r][k] * b[k];
                    }
                }
            }
        }
    }

    // Adds x of the two lanes that differ in the bit `mask`, and splits the sum between them: x[0 ... n / 2)
    // is then its lower half in the lane where the bit is 0, its upper half in the other.
    template <int n>
    static CAPSOPS_DEVICE void halve(float (&x)[8], int mask) {
        const bool upper = lane_index() & mask;
#pragma unroll
        for (int k = 0; k < n / 2; ++k) {
            const float sent = upper ? x[k] : x[k + n / 2], kept = upper ? x[k + n / 2] : x[k];
            x[k] = kept + shuffle_xor(sent, mask);
        }
    }

    template <int M, int N>
    struct Operand {
        Tile x[M][N];
    };

    template <int M, int N>
    static CAPSOPS_DEVICE Operand<M, N> gradient(const Tile (&grad)[M][N]) {
        Operand<M, N> to;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) to.x[m][n][e] = grad[m][n][e];
            }
        }
        return to;
    }

    template <int M, int N>
    static CAPSOPS_DEVICE void grad_u(Tile& out, const Operand<M, N>& grad, int m, const float* w,
                                      int stride) {
        const int q = lane_index() % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum[8] = {};  // over the components d of this lane, then over the lanes
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float b[8];
                    row(b, w + (8 * n + 2 * q + e) * stride);
#pragma unroll
                    for (int k = 0; k < 8; ++k) sum[k] += grad.x[m][n][2 * r + e] * b[k];
                }
            }
            halve<8>(sum, 2);
            halve<4>(sum, 1);
            out[2 * r] += sum[0], out[2 * r + 1] += sum[1];
        }
    }

    template <int M>
    struct Transposed {
        float grad[2][2 * M][2];  // of two tiles along d: rows, components
    };

    template <int M, int N>
    static CAPSOPS_DEVICE Transposed<M> transpose_gradient(const Operand<M, N>& grad, int pair) {
        Transposed<M> to;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                to.grad[0][r][e] = grad.x[r / 2][2 * pair][r % 2 * 2 + e];
                to.grad[1][r][e] =
                    2 * pair + 1 < N ? grad.x[r / 2][N > 1 ? 2 * pair + 1 : 0][r % 2 * 2 + e] : 0.0f;
            }
        }
        return to;
    }

    template <int M>
    static CAPSOPS_DEVICE void grad_w(Tile& out, const Transposed<M>& grad, const float* u, int stride) {
        const int g = lane_index() / 4;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float sum[8] = {};  // over the samples of this lane, then over the lanes
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                float b[8];
                row(b, u + (8 * r + g) * stride);
#pragma unroll
                for (int k = 0; k < 8; ++k) sum[k] += grad.grad[e / 2][r][e % 2] * b[k];
            }
            halve<8>(sum, 16);
            halve<4>(sum, 8);
            halve<2>(sum, 4);
            out[e] += sum[0];
        }
    }

    static CAPSOPS_DEVICE int weight_d(int e) { return 8 * (e / 2) + 2 * (lane_index() % 4) + e % 2; }
    static CAPSOPS_DEVICE int weight_k(int) { return lane_index() / 4; }
};

// Precomputed predictions [samples, stride] in shared memory.
template <int M, int N, typename S>
CAPSOPS_DEVICE void load_predictions(Tile (&out)[M][N], const S* u_hat, int stride) {
    const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float2 x = load_pair(u_hat + (8 * r + g) * stride + 8 * n + 2 * q);
            out[r / 2][n][r % 2 * 2] = x.x, out[r / 2][n][r % 2 * 2 + 1] = x.y;
        }
    }
}

// The gradients of precomputed predictions have no products.
template <typename Number>
struct PrecomputedPredictions {
    typedef Number S;
    static constexpr bool tensor_cores = false, precomputed = true;
};

}  // namespace capsops
