// The gradients of capsule_routing from ds and the softmax of all passes, in one go over u and W.
//
// A block has a chunk of input capsules and a tile of output capsules, and goes through the batch. A warp has
// one output capsule at a time: it holds V and ds of all passes for its samples in registers; per input
// capsule it makes u_hat, from that the coefficients of all passes, grad = sum_t c ds + db V, and from grad
// its parts of du, which the warps then add up, and of dW, which stays in shared memory until the batch is
// through.
#pragma once

#include "fused.h"
#include "products.h"
#include "products_16_bit.h"

namespace capsops {

template <typename Math, int M, int N, int most_passes>
struct Gradients {
    typedef typename Math::S S;
    static constexpr int rows = 16 * M;
    static constexpr int blocks_d = (N + 1) / 2;  // of 16 components

    const Fused& f;
    const Routing& p;
    const Tiling& tiling;
    const int first_pass, passes;  // passes with logits: t = first_pass ... first_pass + passes - 1
    S* const u_stages;             // [2, chunk, rows, stride]
    S* const w;                    // [chunk, tile_j, N 8, stride]
    float4* const grad_w;          // [chunk, tile_j, blocks_d, steps, lanes]
    float4* const grad_u;          // [warps, chunk, M, steps, lanes]

    CAPSOPS_DEVICE explicit Gradients(const Fused& f)
        : f(f),
          p(f.p),
          tiling(f.tiling),
          first_pass(p.detach ? (p.iterations > 1 ? p.iterations - 1 : 1) : 1),
          passes(p.iterations - first_pass),
          u_stages(reinterpret_cast<S*>(shared_memory())),
          w(u_stages + 2 * int(tiling.stage / int(sizeof(S)))),
          grad_w(reinterpret_cast<float4*>(
              shared_memory() + 2 * tiling.stage +
              (int64_t(tiling.chunk) * tiling.tile_j * N * 8 * tiling.stride * int(sizeof(S)) + 15) / 16 *
                  16)),
          grad_u(grad_w + tiling.chunk * tiling.tile_j * blocks_d * tiling.steps * warp_size) {}

    // Copies rows of K numbers, which lie `from_step` apart, to rows that lie `stride` apart; all threads
    // share.
    template <typename Rows>
    CAPSOPS_DEVICE void copy(S* to, int count, Rows from) const {
        const int K = opaque(int(p.K));
        constexpr int piece = 16 / int(sizeof(S));
        const int pieces = f.vectors ? K / piece : K;
#pragma unroll 1
        for (int n = thread_index(); n < count * pieces; n += thread_count()) {
            const int row = n / pieces, k = n % pieces;
            const S* const source = from(row);  // null for rows of 0
            if (f.vectors) {
                const void* const any = source == nullptr ? p.u : source + k * piece;
                copy_async(to + row * tiling.stride + k * piece, any, source != nullptr);
            } else {
                S zero{};
                to[row * tiling.stride + k] = source == nullptr ? zero : source[k];
            }
        }
    }

    CAPSOPS_DEVICE void copy_u(int stage, int i, int count, int b) const {
        copy(u_stages + stage * int(tiling.stage / int(sizeof(S))), count * rows, [&](int row) {
            const int sample = b + row % rows;
            return sample < int(p.B) ? static_cast<const S*>(p.u) + (sample * p.I + i + row / rows) * int(p.K)
                                     : nullptr;
        });
    }

    CAPSOPS_DEVICE void copy_w(int i, int count, int tile_j) const {
        constexpr int D = N * 8;
        copy(w, count * tiling.tile_j * D, [&](int row) {
            const int j = tile_j * tiling.tile_j + row / D % tiling.tile_j, d = row % D;
            const int64_t at = ((i + row / D / tiling.tile_j) * p.J + j) * p.D + d;
            return j < p.J && d < p.D ? static_cast<const S*>(p.weight) + at * p.K : nullptr;
        });
    }

    CAPSOPS_DEVICE void clear() const {
        float* const words = reinterpret_cast<float*>(shared_memory());
        for (int n = thread_index(); n < int(tiling.shared / 4); n += thread_count()) words[n] = 0.0f;
        block_barrier();
    }

    // Numbers of x [B, J, D] in the layout of u_hat's tiles; 0 outside.
    CAPSOPS_DEVICE void load_tiles(Tile (&to)[M][N], const float* x, int b, int j) const {
        const int g = lane_index() / 4, q = lane_index() % 4, D = int(p.D), row_size = int(p.J) * D;
        const float* at = x + int64_t(opaque(b) + g) * row_size + (j * D + 2 * q);
#pragma unroll
        for (int r = 0; r < 2 * M; ++r, at += 8 * row_size) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const bool valid = b + g + 8 * r < int(p.B) && 8 * n + 2 * q + e < D;
                    to[r / 2][n][r % 2 * 2 + e] = valid ? at[8 * n + e] : 0.0f;
                }
            }
        }
    }

    CAPSOPS_DEVICE static float quad_dot(const Tile (&x)[M][N], const Tile (&y)[M][N]) {
        float sum[2 * M] = {};
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[2 * m + e / 2] += x[m][n][e] * y[m][n][e];
            }
        }
        return quad_sum<M>(sum);
    }

    // V and ds of the passes with logits, and the part of grad that is the same for all input capsules.
    struct Known {
        Tile v[most_passes][M][N], grad_s[most_passes][M][N], constant[M][N];
    };

    CAPSOPS_DEVICE void load_known(Known& known, int b, int j) const {
        const bool uniform = !p.detach || p.iterations == 1;
        load_tiles(known.constant, p.grad_s, uniform ? b : int(p.B), j);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) known.constant[m][n][e] *= p.first;
            }
        }
#pragma unroll
        for (int x = 0; x < most_passes; ++x) {
            if (x >= passes) continue;
            load_tiles(known.v[x], p.total_v + (first_pass + x) * p.capsules(), b, j);
            load_tiles(known.grad_s[x], p.grad_s + (first_pass + x) * p.capsules(), b, j);
        }
    }

    // The gradient of u_hat of input capsule i.
    CAPSOPS_DEVICE void make_grad(Tile (&grad)[M][N], const Known& known, const S* u, const S* weight, int i,
                                  int b) const {
        // Of this lane's own row: c and db of the passes with logits.
        float c[most_passes], grad_b[most_passes];
        {
            Tile u_hat[M][N] = {};
            Math::template predict<M, N>(u_hat, u, weight, tiling.stride, tiling.steps);
            const int q = lane_index() % 4, row = b + lane_index() / 4 + 8 * (M == 2 ? q : q % 2);
#pragma unroll
            for (int x = 0; x < most_passes; ++x) {
                c[x] = 0.0f, grad_b[x] = 0.0f;
                if (x >= passes) continue;
                const float logit = quad_dot(u_hat, known.v[x]);
                const float a = p.detach ? 0.0f : quad_dot(u_hat, known.grad_s[x]);
                if (row >= int(p.B)) continue;
                const Softmax s = p.softmax[p.softmax_at(first_pass + x, row, i)];
                c[x] = expf(logit - s.largest) / s.sum;
                grad_b[x] = p.detach ? 0.0f : c[x] * (a - s.mean);
            }
        }
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    grad[r / 2][n][r % 2 * 2 + e] = known.constant[r / 2][n][r % 2 * 2 + e];
                }
            }
#pragma unroll
            for (int x = 0; x < most_passes; ++x) {
                if (x >= passes) continue;
                const int source = lane_index() / 4 * 4 + r;
                const float of_s = shuffle(c[x], source), of_v = shuffle(grad_b[x], source);
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& to = grad[r / 2][n][r % 2 * 2 + e];
                        to += of_s * known.grad_s[x][r / 2][n][r % 2 * 2 + e];
                        to += of_v * known.v[x][r / 2][n][r % 2 * 2 + e];
                    }
                }
            }
        }
    }

    CAPSOPS_DEVICE static void load(Tile& to, const float4& from) {
        to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
    }

    // All that one warp does for one of its output capsules and one tile of samples.
    CAPSOPS_DEVICE void warp_work(int stage, int i, int count, int b, int tile_j, int own_j) const {
        const int j = tile_j * tiling.tile_j + own_j;
        if (j >= int(p.J)) return;
        Known known;
        load_known(known, b, j);
        const S* const u_tile = u_stages + stage * int(tiling.stage / int(sizeof(S)));
#pragma unroll 1
        for (int n = 0; n < count; ++n) {
            const S* const u = u_tile + n * rows * tiling.stride;
            const S* const weight = w + (n * tiling.tile_j + own_j) * N * 8 * tiling.stride;
            Tile grad[M][N];
            make_grad(grad, known, u, weight, i + n, b);
            const auto operand = Math::template gradient<M, N>(grad);
            if (p.grad_u != nullptr) {
                float4* to =
                    grad_u + (warp_index() * tiling.chunk + n) * M * tiling.steps * warp_size + lane_index();
#pragma unroll
                for (int m = 0; m < M; ++m) {
#pragma unroll 1
                    for (int step = 0; step < tiling.steps; ++step, to += warp_size) {
                        Tile sum = {};
                        if (own_j >= warp_count()) load(sum, *to);
                        Math::template grad_u<M, N>(sum, operand, m, weight + step * 8, tiling.stride);
                        *to = make_float4(sum[0], sum[1], sum[2], sum[3]);
                    }
                }
            }
            if (p.grad_weight != nullptr) {
                float4* to =
                    grad_w + (n * tiling.tile_j + own_j) * blocks_d * tiling.steps * warp_size + lane_index();
#pragma unroll
                for (int pair = 0; pair < blocks_d; ++pair) {
                    const auto turned = Math::template turn<M, N>(operand, pair);
#pragma unroll 1
                    for (int step = 0; step < tiling.steps; ++step, to += warp_size) {
                        Tile sum;
                        load(sum, *to);
                        Math::template grad_w<M>(sum, turned, u + step * 8, tiling.stride);
                        *to = make_float4(sum[0], sum[1], sum[2], sum[3]);
                    }
                }
            }
        }
    }

    // du of one tile of samples: the warps' parts in their order.
    CAPSOPS_DEVICE void store_grad_u(int i, int count, int any_b, int tile_j) const {
        const int b = opaque(any_b);
        const int of_warp = tiling.chunk * M * tiling.steps * warp_size;
        const int left = int(p.J) - tile_j * tiling.tile_j, parts = left < warp_count() ? left : warp_count();
#pragma unroll 1
        for (int n = thread_index(); n < count * M * tiling.steps * warp_size; n += thread_count()) {
            Tile sum = {};
            for (int part = 0; part < parts; ++part) {
                Tile x;
                load(x, grad_u[part * of_warp + n]);
                for (int e = 0; e < 4; ++e) sum[e] += x[e];
            }
            const int step = n / warp_size % tiling.steps, m = n / warp_size / tiling.steps % M;
            const int chunk_i = n / warp_size / tiling.steps / M;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = b + 16 * m + 8 * (e / 2) + lane_index() / 4;
                const int k = 8 * step + 2 * (lane_index() % 4) + e % 2;
                if (row >= int(p.B) || k >= int(p.K)) continue;
                const int64_t at = (row * p.I + i + chunk_i) * p.K + k;
                if (f.partial_u == nullptr) {
                    narrow(sum[e], static_cast<S*>(p.grad_u)[at]);
                } else {
                    f.partial_u[tile_j * p.B * p.I * p.K + at] = sum[e];
                }
            }
        }
    }

    // dW of this warp's output capsules, over the batch or a split of it.
    CAPSOPS_DEVICE void store_grad_w(int i, int count, int tile_j, int split) const {
        for (int own_j = warp_index(); own_j < tiling.tile_j; own_j += warp_count()) {
            const int j = tile_j * tiling.tile_j + own_j;
            if (j >= int(p.J)) continue;
            for (int n = 0; n < count; ++n) {
                float4* from =
                    grad_w + (n * tiling.tile_j + own_j) * blocks_d * tiling.steps * warp_size + lane_index();
                for (int block = 0; block < blocks_d * tiling.steps; ++block, from += warp_size) {
                    Tile sum;
                    load(sum, *from);
                    *from = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int d = block / tiling.steps * 16 + Math::weight_d(e);
                        const int k = block % tiling.steps * 8 + Math::weight_k(e);
                        if (d >= p.D || k >= p.K) continue;
                        const int64_t at = (((i + n) * p.J + j) * p.D + d) * p.K + k;
                        if (f.partial_w == nullptr) {
                            narrow(sum[e], static_cast<S*>(p.grad_weight)[at]);
                        } else {
                            f.partial_w[split * p.I * p.J * p.D * p.K + at] = sum[e];
                        }
                    }
                }
            }
        }
    }

    CAPSOPS_DEVICE void run() const {
        clear();
        const int splits = int(tiling.splits), tiles_j = int(tiling.tiles_j), length = int(tiling.length);
        for (int item = int(block_index()); item < int(tiling.items); item += int(block_count())) {
            const int split = item % splits, tile_j = item / splits % tiles_j;
            const int i = item / splits / tiles_j * tiling.chunk, left = int(p.I) - i;
            const int count = left < tiling.chunk ? left : tiling.chunk, begin = split * length;
            const int end = begin + length < int(tiling.tiles_b) ? begin + length : int(tiling.tiles_b);
            copy_w(i, count, tile_j);
            copy_u(0, i, count, begin * rows);
            for (int tile = begin; tile < end; ++tile) {
                const int stage = (tile - begin) % 2;
                wait_for_copies();
                block_barrier();
                if (tile + 1 < end) copy_u(1 - stage, i, count, (tile + 1) * rows);
                for (int own_j = warp_index(); own_j < tiling.tile_j; own_j += warp_count()) {
                    warp_work(stage, i, count, tile * rows, tile_j, own_j);
                }
                if (p.grad_u != nullptr) {
                    block_barrier();
                    store_grad_u(i, count, tile * rows, tile_j);
                }
            }
            if (p.grad_weight != nullptr) store_grad_w(i, count, tile_j, split);
            block_barrier();  // before the next item's copies
        }
    }
};

template <typename Math, int M, int N, int most_passes>
CAPSOPS_KERNEL(most_gradient_warps(Math::tensor_cores) * warp_size, 1)
gradients_kernel(Fused f) {
    Gradients<Math, M, N, most_passes>(f).run();
}

}  // namespace capsops
