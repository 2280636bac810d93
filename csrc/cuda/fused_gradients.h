// The gradients of routing from ds of all passes, in one pass over u and W or over precomputed predictions.
//
// A block has a chunk of input capsules and a tile of output capsules, and loops over the batch. A warp has
// one output capsule at a time and keeps V and ds of its samples in registers. It computes u_hat, and from it
// the logits and a = u_hat . ds of all passes. All threads together compute the softmax over j (or, where j
// is in tiles, read its statistics from memory), c, and db = c (a - sum_j c a). Then every warp computes grad
// = sum_t c ds + db V. For precomputed predictions that is the result. Otherwise the warp computes its part
// of du, which is summed over the warps afterwards, and of dW, which stays in shared memory until the
// whole batch is done.
#pragma once

#include "fused.h"
#include "products.h"
#include "products_16_bit.h"

namespace capsops {

// `register_passes`: passes whose V and ds are in registers at a time. If there are more, they are loaded
// again for each input capsule.
template <typename Math, int M, int N, int register_passes>
struct Gradients {
    typedef typename Math::S S;
    static constexpr int rows = 16 * M;
    static constexpr int blocks_d = (N + 1) / 2;  // blocks of 16 components d

    const Fused& f;
    const Routing& p;
    const Tiling& tiling;
    const int first_pass, passes;  // passes with logits: t = first_pass ... first_pass + passes - 1
    S* const u_stages;             // [2, chunk, rows, stride]
    S* const w;                    // [chunk, tile_j, N 8, stride]
    float4* const grad_w;          // [chunk, tile_j, blocks_d, steps, lanes]
    float* const slots;            // [tile_j, chunk, slot]: logits and a, then c and db, then du of the warps

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
          slots(Math::precomputed
                    ? reinterpret_cast<float*>(shared_memory())
                    : reinterpret_cast<float*>(grad_w + tiling.chunk * tiling.tile_j * blocks_d *
                                                            tiling.steps * warp_size)) {}

    CAPSOPS_DEVICE float* slot(int own_j, int chunk_i) const {
        return slots + (own_j * tiling.chunk + chunk_i) * tiling.slot;
    }

    // Begins to copy `count` rows of K numbers, row n from from(n), to rows that are `stride` apart; all
    // threads of the block together.
    template <typename Rows>
    CAPSOPS_DEVICE void copy(S* to, int count, Rows from) const {
        const int K = opaque(int(p.K));
        constexpr int copy_width = 16 / int(sizeof(S));
        const int copies_per_row = f.vectors ? K / copy_width : K;
#pragma unroll 1
        for (int n = thread_index(); n < count * copies_per_row; n += thread_count()) {
            const int row = n / copies_per_row, k = n % copies_per_row;
            const S* const source = from(row);  // null for a row of zeros
            if (f.vectors) {
                const void* const address = source == nullptr ? p.u : source + k * copy_width;
                copy_async(to + row * tiling.stride + k * copy_width, address, source != nullptr);
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

    // Loads numbers of x [B, J, D] in the layout of u_hat's tiles; 0 outside of x.
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

    // V and ds of some passes with logits, and the part of grad that is the same for all input capsules.
    struct PassValues {
        Tile v[register_passes][M][N], grad_s[register_passes][M][N], constant[M][N];
    };

    CAPSOPS_DEVICE void load_constant(PassValues& values, int b, int j) const {
        const bool uniform = !p.detach || p.iterations == 1;
        load_tiles(values.constant, p.grad_s, uniform ? b : int(p.B), j);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) values.constant[m][n][e] *= p.first;
            }
        }
    }

    CAPSOPS_DEVICE void load_passes(PassValues& values, int first, int b, int j) const {
#pragma unroll
        for (int x = 0; x < register_passes; ++x) {
            if (first + x >= passes) continue;
            const int t = first_pass + first + x;
            load_tiles(values.v[x], p.total_v + t * p.capsules(), b, j);
            load_tiles(values.grad_s[x], p.grad_s + t * p.capsules(), b, j);
        }
    }

    // Whether the values that a warp has loaded are valid for all of its work on a tile of samples.
    CAPSOPS_DEVICE bool loaded_once() const {
        return passes <= register_passes && tiling.tile_j <= warp_count();
    }

    CAPSOPS_DEVICE void load_u_hat(Tile (&u_hat)[M][N], int i, int b, int j) const {
        const int g = lane_index() / 4, q = lane_index() % 4, D = int(p.D);
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const int row = b + g + 8 * r;
            const S* const from =
                static_cast<const S*>(p.u) + ((int64_t(row) * p.I + i) * p.J + j) * D + 2 * q;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float2 x = make_float2(0.0f, 0.0f);
                const int d = 8 * n + 2 * q;
                if (row < int(p.B) && d < D) {
                    if (f.vectors) {
                        x = load_pair(from + 8 * n);
                    } else {
                        x.x = widen(from[8 * n]);
                        if (d + 1 < D) x.y = widen(from[8 * n + 1]);
                    }
                }
                u_hat[r / 2][n][r % 2 * 2] = x.x, u_hat[r / 2][n][r % 2 * 2 + 1] = x.y;
            }
        }
    }

    // Computes the logits and a of one output capsule for the passes that are loaded.
    CAPSOPS_DEVICE void agreements(const PassValues& values, int first, int stage, int i, int count, int b,
                                   int j, int own_j) const {
        const int q = lane_index() % 4, row = lane_index() / 4 + 8 * q;
        const S* u = u_stages + stage * int(tiling.stage / int(sizeof(S)));
#pragma unroll 1
        for (int n = 0; n < count; ++n) {
            Tile u_hat[M][N] = {};
            if constexpr (Math::precomputed) {
                load_u_hat(u_hat, i + n, b, j);
            } else {
                Math::template predict<M, N>(u_hat, u + n * rows * tiling.stride,
                                             w + (n * tiling.tile_j + own_j) * N * 8 * tiling.stride,
                                             tiling.stride, tiling.steps);
            }
            float* const to = slot(own_j, n) + 2 * first * rows + row;
#pragma unroll
            for (int x = 0; x < register_passes; ++x) {
                if (first + x >= passes) continue;
                const float logit = quad_dot(u_hat, values.v[x]);
                if (q < 2 * M) to[2 * x * rows] = logit;
                if (p.detach) continue;
                const float a = quad_dot(u_hat, values.grad_s[x]);
                if (q < 2 * M) to[(2 * x + 1) * rows] = a;
            }
        }
    }

    // Softmax over j: replaces logits and a of all passes by c and db. A thread has one pass and one (b, i).
    CAPSOPS_DEVICE void softmax_over_j(int i, int count, int first_b, int tile_j) const {
        const int b = opaque(first_b), to_next_j = tiling.chunk * tiling.slot;
        const int left = int(p.J) - tile_j * tiling.tile_j, js = left < tiling.tile_j ? left : tiling.tile_j;
#pragma unroll 1
        for (int n = thread_index(); n < count * passes * rows; n += thread_count()) {
            const int row = n % rows, x = n / rows % passes, chunk_i = n / rows / passes;
            float* const logits = slot(0, chunk_i) + 2 * x * rows + row;
            float* const a = logits + rows;
            const bool valid = b + row < int(p.B);
            Softmax s{p.leaky ? 0.0f : -INFINITY, 0.0f, 0.0f};
            const bool has_statistics = tiling.tiles_j > 1;
            if (valid && has_statistics) s = p.softmax[p.softmax_at(first_pass + x, b + row, i + chunk_i)];
            for (int j = 0; j < js && !has_statistics; ++j)
                s.largest = fmaxf(s.largest, logits[j * to_next_j]);
            if (!has_statistics) s.sum = p.leaky ? expf(-s.largest) : 0.0f;
            for (int j = 0; j < js; ++j) {
                const float e = expf(logits[j * to_next_j] - s.largest);
                logits[j * to_next_j] = e;
                if (has_statistics) continue;
                s.sum += e;
                if (!p.detach) s.mean += e * a[j * to_next_j];
            }
            if (!has_statistics) s.mean /= s.sum;
            const float inverse = 1.0f / s.sum;
            for (int j = 0; j < js; ++j) {
                const float c = valid ? logits[j * to_next_j] * inverse : 0.0f;
                logits[j * to_next_j] = c;
                a[j * to_next_j] = p.detach || !valid ? 0.0f : c * (a[j * to_next_j] - s.mean);
            }
        }
    }

    // Adds c ds + db V of the passes that are loaded to `grad`.
    CAPSOPS_DEVICE void add_passes(Tile (&grad)[M][N], const PassValues& values, int first,
                                   const float* factors) const {
#pragma unroll
        for (int x = 0; x < register_passes; ++x) {
            if (first + x >= passes) continue;
            const float* const pass_factors = factors + 2 * (first + x) * rows + lane_index() / 4;
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) {
                const float c = pass_factors[8 * r], grad_b = pass_factors[rows + 8 * r];
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& to = grad[r / 2][n][r % 2 * 2 + e];
                        to += c * values.grad_s[x][r / 2][n][r % 2 * 2 + e];
                        to += grad_b * values.v[x][r / 2][n][r % 2 * 2 + e];
                    }
                }
            }
        }
    }

    // Stores the gradient of precomputed predictions.
    CAPSOPS_DEVICE void store_grad(const Tile (&grad)[M][N], int i, int b, int j) const {
        const int g = lane_index() / 4, q = lane_index() % 4, D = int(p.D);
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
            const int row = b + g + 8 * r;
            if (row >= int(p.B)) continue;
            S* const to = static_cast<S*>(p.grad_u) + ((int64_t(row) * p.I + i) * p.J + j) * D + 2 * q;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int d = 8 * n + 2 * q;
                const float x = grad[r / 2][n][r % 2 * 2], y = grad[r / 2][n][r % 2 * 2 + 1];
                if (d >= D) continue;
                if (f.vectors) {
                    store_pair(x, y, to + 8 * n);
                } else {
                    narrow(x, to[8 * n]);
                    if (d + 1 < D) narrow(y, to[8 * n + 1]);
                }
            }
        }
    }

    CAPSOPS_DEVICE static void load(Tile& to, const float4& from) {
        to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
    }

    // Multiplies the gradient of u_hat of one input and one output capsule by W and u: its parts of du and
    // dW.
    CAPSOPS_DEVICE void products(const Tile (&grad)[M][N], int stage, int n, int own_j) const {
        const S* const u = u_stages + stage * int(tiling.stage / int(sizeof(S))) + n * rows * tiling.stride;
        const S* const weight = w + (n * tiling.tile_j + own_j) * N * 8 * tiling.stride;
        const auto operand = Math::template gradient<M, N>(grad);
        if (p.grad_u != nullptr) {
            float4* to = reinterpret_cast<float4*>(slot(warp_index(), n)) + lane_index();
            warp_barrier();  // before c and db are overwritten
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
                const auto transposed = Math::template transpose_gradient<M, N>(operand, pair);
#pragma unroll 1
                for (int step = 0; step < tiling.steps; ++step, to += warp_size) {
                    Tile sum;
                    load(sum, *to);
                    Math::template grad_w<M>(sum, transposed, u + step * 8, tiling.stride);
                    *to = make_float4(sum[0], sum[1], sum[2], sum[3]);
                }
            }
        }
    }

    // Everything that one warp does for one of its output capsules after c and db are computed.
    CAPSOPS_DEVICE void gradients(PassValues& values, int stage, int i, int count, int b, int j,
                                  int own_j) const {
        if (!loaded_once()) load_constant(values, b, j);
        if (!loaded_once() && passes <= register_passes) load_passes(values, 0, b, j);
#pragma unroll 1
        for (int n = 0; n < count; ++n) {
            Tile grad[M][N];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int x = 0; x < N; ++x) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) grad[m][x][e] = values.constant[m][x][e];
                }
            }
#pragma unroll 1
            for (int first = 0; first < passes; first += register_passes) {
                if (passes > register_passes) load_passes(values, first, b, j);
                add_passes(grad, values, first, slot(own_j, n));
            }
            if constexpr (Math::precomputed) {
                store_grad(grad, i + n, b, j);
            } else {
                products(grad, stage, n, own_j);
            }
        }
    }

    // Everything that one block does with one tile of samples.
    CAPSOPS_DEVICE void tile_work(int stage, int i, int count, int b, int tile_j) const {
        PassValues values;
        for (int own_j = warp_index(); own_j < tiling.tile_j; own_j += warp_count()) {
            const int j = tile_j * tiling.tile_j + own_j;
            if (j >= int(p.J)) continue;
            load_constant(values, b, j);
#pragma unroll 1
            for (int first = 0; first < passes; first += register_passes) {
                load_passes(values, first, b, j);
                agreements(values, first, stage, i, count, b, j, own_j);
            }
        }
        if (passes > 0) {
            block_barrier();
            softmax_over_j(i, count, b, tile_j);
            block_barrier();
        }
        for (int own_j = warp_index(); own_j < tiling.tile_j; own_j += warp_count()) {
            const int j = tile_j * tiling.tile_j + own_j;
            if (j < int(p.J)) gradients(values, stage, i, count, b, j, own_j);
        }
    }

    // Stores du of one tile of samples: sums the parts of the warps in a fixed order.
    CAPSOPS_DEVICE void store_grad_u(int i, int count, int first_b, int tile_j) const {
        const int b = opaque(first_b), per_slot = M * tiling.steps * warp_size;
        const int left = int(p.J) - tile_j * tiling.tile_j, parts = left < warp_count() ? left : warp_count();
#pragma unroll 1
        for (int n = thread_index(); n < count * per_slot; n += thread_count()) {
            const int chunk_i = n / per_slot;
            Tile sum = {};
            for (int part = 0; part < parts; ++part) {
                Tile x;
                load(x, reinterpret_cast<const float4*>(slot(part, chunk_i))[n % per_slot]);
                for (int e = 0; e < 4; ++e) sum[e] += x[e];
            }
            const int step = n / warp_size % tiling.steps, m = n / warp_size / tiling.steps % M;
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

    // Stores dW of this warp's output capsules, summed over the batch or a split of it.
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
            if constexpr (!Math::precomputed) {
                copy_w(i, count, tile_j);
                copy_u(0, i, count, begin * rows);
            }
            for (int tile = begin; tile < end; ++tile) {
                const int stage = (tile - begin) % 2;
                wait_for_copies();
                block_barrier();
                if constexpr (Math::precomputed) {
                    tile_work(stage, i, count, tile * rows, tile_j);
                } else {
                    if (tile + 1 < end) copy_u(1 - stage, i, count, (tile + 1) * rows);
                    tile_work(stage, i, count, tile * rows, tile_j);
                    if (p.grad_u != nullptr) {
                        block_barrier();
                        store_grad_u(i, count, tile * rows, tile_j);
                    }
                }
            }
            if constexpr (!Math::precomputed) {
                if (p.grad_weight != nullptr) store_grad_w(i, count, tile_j, split);
            }
            block_barrier();  // before the next item's copies
        }
    }
};

template <typename Math, int M, int N, int register_passes>
CAPSOPS_KERNEL(max_gradient_warps(Math::tensor_cores || Math::precomputed) * warp_size, 1)
gradients_kernel(Fused f) {
    Gradients<Math, M, N, register_passes>(f).run();
}

}  // namespace capsops
