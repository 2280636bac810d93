// The products of products.h for 16-bit numbers on tensor cores: depth 16, or 8 for the remainder of K.
//
// Products of u and W are exact and are summed in float32. The gradient of u_hat is float32 and has to be
// rounded to become an operand:
//   bfloat16: to bfloat16, once. Autograd of the reference keeps this gradient in bfloat16 too, after more
//   roundings. float16: to TF32, which has as many significant bits (11) and the exponent range of float32,
//   so that gradients below the range of float16 are not lost.
#pragma once

#include "products.h"

namespace capsops {

struct Bfloat16Gradients {
    typedef Bfloat16 S;

    // Pairs along d of the rows g + 8 r.
    template <int M, int N>
    struct Operand {
        uint32_t x[2 * M][N];
    };

    template <int M, int N>
    static CAPSOPS_DEVICE Operand<M, N> gradient(const Tile (&grad)[M][N]) {
        Operand<M, N> to;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const Tile& x = grad[r / 2][n];
                to.x[r][n] = pack_pair<S>(x[r % 2 * 2], x[r % 2 * 2 + 1]);
            }
        }
        return to;
    }

    template <int M, int N>
    static CAPSOPS_DEVICE void grad_u(Tile& out, const Operand<M, N>& grad, int m, const S* w, int stride) {
        const int lane = lane_index();
        if constexpr (N == 1) {
            const uint32_t a[2] = {grad.x[2 * m][0], grad.x[2 * m + 1][0]};
            uint32_t b[1];
            load_transposed(b, w + lane % 8 * stride);
            mma_16_bit<S>(out, a, b);
        } else {
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                const uint32_t a[4] = {grad.x[2 * m][n], grad.x[2 * m + 1][n], grad.x[2 * m][n + 1],
                                       grad.x[2 * m + 1][n + 1]};
                uint32_t b[2];
                load_transposed(b, w + (8 * n + lane % 16) * stride);
                mma_16_bit<S>(out, a, b);
            }
        }
    }

    template <int M>
    struct Transposed {
        uint32_t a[M][4];
    };

    template <int M, int N>
    static CAPSOPS_DEVICE Transposed<M> transpose_gradient(const Operand<M, N>& grad, int pair) {
        Transposed<M> to;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int n = 2 * pair + e % 2;
                to.a[m][e] = n < N ? transpose_pairs(grad.x[2 * m + e / 2][n < N ? n : 0]) : 0;
            }
        }
        return to;
    }

    template <int M>
    static CAPSOPS_DEVICE void grad_w(Tile& out, const Transposed<M>& grad, const S* u, int stride) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            uint32_t b[2];
            load_transposed(b, u + (16 * m + lane_index() % 16) * stride);
            mma_16_bit<S>(out, grad.a[m], b);
        }
    }

    static CAPSOPS_DEVICE int weight_d(int e) { return lane_index() / 4 + 8 * (e / 2); }
    static CAPSOPS_DEVICE int weight_k(int e) { return 2 * (lane_index() % 4) + e % 2; }
};

template <typename Number>
struct SixteenBit : std::conditional<std::is_same<Number, Bfloat16>::value, Bfloat16Gradients,
                                     Tf32Gradients<Number>>::type {
    typedef Number S;
    static constexpr bool tensor_cores = true, precomputed = false;

    // Depth 16.
    template <int M, int N>
    static CAPSOPS_DEVICE void multiply_16(Tile (&out)[M][N], const S* u, const S* w, int stride) {
        const int lane = lane_index();
        uint32_t a[M][4], b[N][2];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            load_matrices(a[m], u + (16 * m + lane % 16) * stride + lane / 16 * 8);
        }
        if constexpr (N == 1) {
            load_matrices(b[0], w + lane % 8 * stride + lane / 8 % 2 * 8);
        } else {
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t x[4];
                load_matrices(x, w + (8 * n + lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
                b[n][0] = x[0], b[n][1] = x[1], b[n + 1][0] = x[2], b[n + 1][1] = x[3];
            }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) mma_16_bit<S>(out[m][n], a[m], b[n]);
        }
    }

    // Depth 8.
    template <int M, int N>
    static CAPSOPS_DEVICE void multiply_8(Tile (&out)[M][N], const S* u, const S* w, int stride) {
        const int lane = lane_index();
        uint32_t a[2 * M], b[N];
        load_matrices(a, u + lane % (16 * M) * stride);
        load_matrices(b, w + lane % (8 * N) * stride);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint32_t rows[2] = {a[2 * m], a[2 * m + 1]}, column[1] = {b[n]};
                mma_16_bit<S>(out[m][n], rows, column);
            }
        }
    }

    template <int M, int N>
    static CAPSOPS_DEVICE void predict(Tile (&out)[M][N], const S* u, const S* w, int stride, int steps) {
#pragma unroll 1
        for (; steps > 1; steps -= 2, u += 16, w += 16) multiply_16<M, N>(out, u, w, stride);
        if (steps > 0) multiply_8<M, N>(out, u, w, stride);
    }
};

}  // namespace capsops
