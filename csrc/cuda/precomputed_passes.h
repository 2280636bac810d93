// The passes of routing over precomputed predictions, forward and backward: sums over i of c u_hat, or of
// db u_hat.
//
// A block processes one chunk of input capsules at a time, which it copies to shared memory. Every warp
// computes the logits of its output capsule (and backward a = u_hat . ds); all threads together compute the
// softmax over j; every warp adds up its output capsule's predictions with their coefficients.
#pragma once

#include "fused.h"
#include "products.h"

namespace capsops {

// What a step does about the softmax over j.
enum class PrecomputedStep {
    whole,            // the block has all j: computes it
    statistics,       // j is in tiles: computes only its maximum and sums
    from_statistics,  // j is in tiles: computes it from those
};

template <typename S, int M, int N, bool backward>
struct PrecomputedPasses {
    static constexpr int samples = 16 * M;  // per warp

    const Fused& f;
    const Routing& p;
    const Tiling& tiling;
    const int t;
    const int rows;  // samples per block
    S* const stages;
    float* const logits;     // [chunk, tile_j, rows]; overwritten by the coefficients
    float* const a;          // the same shape, backward only
    Softmax* const softmax;  // [chunk, rows], carried from one tile of j to the next

    CAPSOPS_DEVICE PrecomputedPasses(const Fused& f, int t)
        : f(f),
          p(f.p),
          tiling(f.tiling),
          t(t),
          rows(samples * tiling.groups),
          stages(reinterpret_cast<S*>(shared_memory())),
          logits(reinterpret_cast<float*>(shared_memory() + 2 * tiling.stage)),
          a(logits + tiling.chunk * tiling.tile_j * rows),
          softmax(reinterpret_cast<Softmax*>(a + tiling.chunk * tiling.tile_j * rows)) {}

    CAPSOPS_DEVICE int own_j() const { return warp_index() % tiling.tile_j; }
    CAPSOPS_DEVICE int own_group() const { return warp_index() / tiling.tile_j; }
    // Where the predictions of this warp's output capsule and samples begin.
    CAPSOPS_DEVICE S* own_tile(int stage, int i) const {
        const int row = (i * tiling.tile_j + own_j()) * rows + own_group() * samples;
        return stages + stage * int(tiling.stage / int(sizeof(S))) + row * tiling.stride;
    }

    // The padding of D, which no copy writes, must be 0.
    CAPSOPS_DEVICE void clear_stages() const {
        float* const words = reinterpret_cast<float*>(stages);
        for (int n = thread_index(); n < int(2 * tiling.stage / 4); n += thread_count()) words[n] = 0.0f;
        block_barrier();
    }

    // Begins to copy the predictions of this warp's output capsule and samples.
    CAPSOPS_DEVICE void copy(int stage, int i, int count, int first_b, int tile_j) const {
        const int b = opaque(first_b) + own_group() * samples, j = tile_j * tiling.tile_j + own_j(),
                  D = int(p.D);
        if (j >= int(p.J)) return;
        constexpr int copy_width = 16 / int(sizeof(S));
        const int copies_per_row = f.vectors ? D / copy_width : D,
                  samples_at_once = warp_size / copies_per_row;
        const int first = lane_index() / copies_per_row,
                  d = lane_index() % copies_per_row * (f.vectors ? copy_width : 1);
        if (first >= samples_at_once) return;
#pragma unroll 1
        for (int chunk_i = 0; chunk_i < count; ++chunk_i) {
            const int row_size = int(p.J) * D;
            const S* const from =
                static_cast<const S*>(p.u) + (int64_t(b) * p.I + i + chunk_i) * row_size + (j * D + d);
            S* const to = own_tile(stage, chunk_i) + d;
#pragma unroll 1
            for (int sample = first; sample < samples; sample += samples_at_once) {
                const bool valid = b + sample < int(p.B);
                const S* const source = valid ? from + sample * p.I * row_size : static_cast<const S*>(p.u);
                if (f.vectors) {
                    copy_async(to + sample * tiling.stride, source, valid);
                } else {
                    S zero{};
                    to[sample * tiling.stride] = valid ? *source : zero;
                }
            }
        }
    }

    // Calls function(number, address, whether it exists) for the numbers of x [B, J, D] in this lane, in the
    // layout of u_hat's tiles.
    template <typename Pointer, typename Function>
    CAPSOPS_DEVICE void for_tiles(Tile (&tiles)[M][N], Pointer x, int b, int j, Function function) const {
        const int g = lane_index() / 4, q = lane_index() % 4, D = int(p.D), row_size = int(p.J) * D;
        const int row = opaque(b) + own_group() * samples + g;
        Pointer at = x + int64_t(row) * row_size + (j * D + 2 * q);
#pragma unroll
        for (int r = 0; r < 2 * M; ++r, at += 8 * row_size) {
            const bool inside = row + 8 * r < int(p.B) && j < int(p.J);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const bool valid = inside && 8 * n + 2 * q + e < D;
                    function(tiles[r / 2][n][r % 2 * 2 + e], at + (8 * n + e), valid);
                }
            }
        }
    }

    CAPSOPS_DEVICE void load_tiles(Tile (&to)[M][N], const float* x, int b, int j) const {
        for_tiles(to, x, b, j, [](float& to, const float* from, bool valid) {
            to = valid ? load_bypassing_l1(from) : 0.0f;
        });
    }

    CAPSOPS_DEVICE void store_partial(Tile (&sum)[M][N], int split, int b, int j) const {
        const float scale = t == 0 ? p.first : 1.0f;
        for_tiles(sum, p.partial + split * p.capsules(), b, j, [scale](float from, float* to, bool valid) {
            if (valid) *to = from * scale;
        });
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

    // Computes the logits, and backward a, of this warp's output capsule.
    CAPSOPS_DEVICE void agreements(int stage, int count, const Tile (&v)[M][N],
                                   const Tile (&grad_s)[M][N]) const {
        const int row = own_group() * samples + lane_index() / 4 + 8 * (lane_index() % 4);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            Tile u_hat[M][N];
            load_predictions<M, N>(u_hat, own_tile(stage, i), tiling.stride);
            const int at = (i * tiling.tile_j + own_j()) * rows + row;
            const float logit = quad_dot(u_hat, v);
            const bool stores = lane_index() % 4 < 2 * M;
            if (stores) logits[at] = logit;
            if (backward) {
                const float x = quad_dot(u_hat, grad_s);
                if (stores) a[at] = x;
            }
        }
    }

    // Softmax over j: replaces the logits by the coefficients, or computes its statistics only. A warp has
    // one input capsule of the chunk and 32 of the block's samples (or 16, in half of its lanes).
    CAPSOPS_DEVICE void softmax_over_j(PrecomputedStep step, int i, int count, int first_b,
                                       int tile_j) const {
        const int b = opaque(first_b);
        const int sets = (rows + warp_size - 1) / warp_size;
        const int left = int(p.J) - tile_j * tiling.tile_j, js = left < tiling.tile_j ? left : tiling.tile_j;
#pragma unroll 1
        for (int n = warp_index(); n < count * sets; n += warp_count()) {
            const int chunk_i = n / sets, row = n % sets * warp_size + lane_index();
            if (row >= rows || b + row >= int(p.B)) continue;
            float* const x = logits + chunk_i * tiling.tile_j * rows + row;
            float* const y = a + chunk_i * tiling.tile_j * rows + row;
            const int64_t softmax_index = p.softmax_at(t, b + row, i + chunk_i);
            Softmax s{p.leaky ? 0.0f : -INFINITY, p.leaky ? 1.0f : 0.0f, 0.0f};
            if (step == PrecomputedStep::statistics && tile_j > 0) s = softmax[chunk_i * rows + row];
            if (step == PrecomputedStep::from_statistics) {
                s.largest = load_bypassing_l1(&p.softmax[softmax_index].largest);
                s.sum = load_bypassing_l1(&p.softmax[softmax_index].sum);
                s.mean = load_bypassing_l1(&p.softmax[softmax_index].mean);
            } else {
                const float before = s.largest;
                for (int j = 0; j < js; ++j) s.largest = fmaxf(s.largest, x[j * rows]);
                const float shrink = before == s.largest ? 1.0f : expf(before - s.largest);
                s.sum *= shrink, s.mean *= shrink;
                for (int j = 0; j < js; ++j) {
                    const float e = expf(x[j * rows] - s.largest);
                    x[j * rows] = e;
                    s.sum += e;
                    if (backward) s.mean += e * y[j * rows];
                }
            }
            if (step == PrecomputedStep::statistics) {
                if (tile_j + 1 < int(tiling.tiles_j)) {
                    softmax[chunk_i * rows + row] = s;
                } else {
                    p.softmax[softmax_index] = {s.largest, s.sum, s.mean / s.sum};
                }
                continue;
            }
            if (step == PrecomputedStep::whole) s.mean /= s.sum;
            if (backward && step == PrecomputedStep::whole && p.softmax != nullptr)
                p.softmax[softmax_index] = s;
            const float inverse = 1.0f / s.sum;
            for (int j = 0; j < js; ++j) {
                const float c =
                    (step == PrecomputedStep::whole ? x[j * rows] : expf(x[j * rows] - s.largest)) * inverse;
                x[j * rows] = backward ? c * (y[j * rows] - s.mean) : c;
                if (!backward && f.couplings && t + 1 == p.iterations) {
                    const int64_t at =
                        (int64_t(b + row) * p.I + i + chunk_i) * p.J + tile_j * tiling.tile_j + j;
                    narrow(c, static_cast<S*>(p.couplings)[at]);
                }
            }
        }
    }

    // Adds coefficient times u_hat of this warp's output capsule to `sum`; the first pass has no
    // coefficients.
    CAPSOPS_DEVICE void accumulate(int stage, int count, Tile (&sum)[M][N]) const {
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            float c[2 * M];
            const float* const x =
                logits + (i * tiling.tile_j + own_j()) * rows + own_group() * samples + lane_index() / 4;
#pragma unroll
            for (int r = 0; r < 2 * M; ++r) c[r] = t > 0 ? x[8 * r] : 1.0f;
            Tile u_hat[M][N];
            load_predictions<M, N>(u_hat, own_tile(stage, i), tiling.stride);
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[m][n][e] += c[2 * m + e / 2] * u_hat[m][n][e];
                }
            }
        }
    }

    // One step of pass t over all of the block's items.
    CAPSOPS_DEVICE void run(PrecomputedStep step) const {
        const bool statistics = step == PrecomputedStep::statistics;
        // The statistics need no partial sums, so i can be split into as many parts as there are chunks.
        const int all_tiles = int(tiling.tiles_j), length = statistics ? tiling.chunk : int(tiling.length);
        const int splits = (int(p.I) + length - 1) / length;
        const int tiles_j = statistics ? 1 : all_tiles;
        const int inner = statistics ? all_tiles : 1;  // tiles of j per item
        const bool sums = !statistics && !(f.couplings && t + 1 == p.iterations);
        for (int item = int(block_index()); item < int(tiling.tiles_b) * tiles_j * splits;
             item += int(block_count())) {
            const int split = item % splits, b = item / splits / tiles_j * rows,
                      outer_j = item / splits % tiles_j;
            const int begin = split * length, end = begin + length < int(p.I) ? begin + length : int(p.I);
            int i = begin, tile = outer_j, stage = 0;
            Tile v[M][N], grad_s[M][N], sum[M][N] = {};
            copy(0, begin, count_of(begin, end), b, outer_j);
            while (i < end) {
                const int count = count_of(i, end), j = tile * tiling.tile_j + own_j();
                if (t > 0 && (inner > 1 || i == begin)) {
                    load_tiles(v, p.total_v + t * p.capsules(), b, j);
                    if (backward) load_tiles(grad_s, p.grad_s + t * p.capsules(), b, j);
                }
                const bool last_tile = tile + 1 == outer_j + inner;
                const int next_tile = last_tile ? outer_j : tile + 1,
                          next_i = last_tile ? i + tiling.chunk : i;
                wait_for_copies();
                block_barrier();
                if (next_i < end) copy(1 - stage, next_i, count_of(next_i, end), b, next_tile);
                if (t > 0) {
                    if (j < int(p.J)) agreements(stage, count, v, grad_s);
                    block_barrier();
                    softmax_over_j(step, i, count, b, tile);
                    block_barrier();
                }
                if (sums && j < int(p.J)) accumulate(stage, count, sum);
                i = next_i, tile = next_tile, stage = 1 - stage;
            }
            block_barrier();  // before the next item's first copy
            if (sums) store_partial(sum, split, b, outer_j * tiling.tile_j + own_j());
        }
    }
    CAPSOPS_DEVICE int count_of(int i, int end) const {
        return end - i < tiling.chunk ? end - i : tiling.chunk;
    }
};

// Step n of the sequence. Forward, for each pass: the statistics of the softmax if j is in tiles, the sums,
// and finish_forward(). Backward: begin_backward(), then the same for the passes from the last to the second.
struct Sequence {
    int t;
    bool begins, finishes;
    PrecomputedStep step;

    CAPSOPS_DEVICE Sequence(const Fused& f, bool backward, int n) : begins(backward && n == 0) {
        const int tiled = f.tiling.tiles_j > 1, steps_per_pass = tiled + 2;
        const int m = backward ? n - 1 : n, rest = m % steps_per_pass;
        t = backward ? f.p.iterations - 1 - m / steps_per_pass : m / steps_per_pass;
        finishes = rest + 1 == steps_per_pass;
        step = tiled == 0  ? PrecomputedStep::whole
               : rest == 0 ? PrecomputedStep::statistics
                           : PrecomputedStep::from_statistics;
        // With detach the gradient needs the softmax of the last pass but no sums.
        if (backward && f.p.detach) step = PrecomputedStep::statistics, finishes = false;
    }
};

// All steps in one launch if its blocks run at the same time; the grid waits at a barrier between steps.
template <typename S, int M, int N, bool backward>
CAPSOPS_KERNEL(max_warps* warp_size, 1)
precomputed_passes_kernel(CAPSOPS_PARAMETER Fused f) {
    PrecomputedPasses<S, M, N, backward>(f, 0).clear_stages();
    for (int n = f.first_step; n < f.last_step; ++n) {
        if (n > f.first_step) grid_barrier();
        const Sequence now(f, backward, opaque(n));
        if (now.begins) {
            if constexpr (backward) begin_backward<S>(f.p);
        } else if (now.finishes) {
            if constexpr (backward) {
                finish_backward(f.p, now.t);
            } else {
                finish_forward<S>(f.p, now.t);
            }
        } else if (now.t > 0 || now.step != PrecomputedStep::statistics) {
            PrecomputedPasses<S, M, N, backward>(f, now.t).run(now.step);
        }
    }
}

}  // namespace capsops
