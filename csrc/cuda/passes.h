// The passes of routing, forward and backward: sums over i of c u_hat, or of db u_hat.
//
// A warp has 16 samples and a tile of output capsules, whose V and sums are in its registers, and goes
// through a range of input capsules. For each it computes u_hat on tensor cores, from it the logits (and
// backward a = u_hat . ds), the softmax over j, and u_hat once more, which it adds up with its coefficient:
// tensor cores compute u_hat faster than it could be kept. The warps of a group have different samples and
// share W, in a ring of slots in shared memory; the groups of a block, and the blocks of a cluster, have
// different input capsules and add their sums up in the end, in a fixed order.
#pragma once

#include "operands.h"
#include "passes_host.h"

namespace capsops {

// What a step does about the softmax over j.
enum class Step {
    uniform,       // the first pass: all couplings are the same
    whole,         // a tile has all j: computes it
    of_tile,       // j is in tiles: only computes the maximum and sums of a tile
    of_all_tiles,  // j is in tiles: computes it from those
};

// A prediction in float32, from u and W as they are.
template <typename S>
CAPSOPS_DEVICE float plain_prediction(const Routing& p, int64_t b, int64_t i, int64_t j, int64_t d) {
    const int64_t u = (b * p.I + i) * p.K, w = ((i * p.J + j) * p.D + d) * p.K;
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t k = 0; k < p.K; ++k) sum += load<S>(p.u, u + k) * load<S>(p.weight, w + k);
    return sum;
}

// Step n of the sequence. Forward: the operands are arranged; then, for each pass, the maximum and sums of
// the softmax of each tile of j if there are several, the sums, and finish_forward(). Backward:
// begin_backward() beside the first; then the same for the passes from the last to the second.
struct PassSequence {
    int t;
    bool begins, finishes, sums;
    Step step;

    CAPSOPS_DEVICE PassSequence(const Passes& f, bool backward, int n) : begins(n == 0) {
        const bool tiled = f.tiling.tiles_j > 1;
        const int steps_per_pass = tiled ? 3 : 2, pass = tiled ? (n - 1) / 3 : (n - 1) / 2,
                  rest = n - 1 - pass * steps_per_pass;
        t = backward ? f.p.iterations - 1 - pass : pass;
        finishes = rest + 1 == steps_per_pass;
        step = t == 0 ? Step::uniform : !tiled ? Step::whole : rest == 0 ? Step::of_tile : Step::of_all_tiles;
        // With detach the gradient needs the softmax of the last pass but no sums.
        sums =
            !(tiled && rest == 0) && !(backward && f.p.detach) && !(f.couplings && t + 1 == f.p.iterations);
    }
};

// Where a warp is in its work. It is in shared memory: the registers are full.
struct Progress {
    int step;
    int item, split, tile_j, first_j, count_j;  // the output capsules first_j ... first_j + count_j - 1
    int b;                                      // the first sample of the item
    int first_i, end_i;                         // the input capsules of the warp's group
};
static_assert(sizeof(Progress) <= progress_bytes, "plan.h reserves too little");

CAPSOPS_DEVICE Progress* progress(const Passes& f) {
    return reinterpret_cast<Progress*>(shared_memory() + f.tiling.progress_offset +
                                       warp_index() * progress_bytes);
}

template <typename Math, typename Groups, bool one_step, bool backward, Step step>
struct Pass {
    typedef typename Math::S S;
    static constexpr int N = Groups::n;

    const Passes& f;
    const Routing& p;
    const PassTiling& tiling;
    const int lane, group, m;  // of this thread; m: which of its group's tiles of samples
    const int steps;           // of depth Math::depth that cover K

    CAPSOPS_DEVICE explicit Pass(const Passes& f)
        : f(f),
          p(f.p),
          tiling(f.tiling),
          lane(lane_index()),
          group(warp_index() >> tiling.m_bits),
          m(warp_index() & (tiling.m_tiles - 1)),
          steps(one_step ? 1 : tiling.steps) {}

    // What is needed rarely is computed when it is: the registers are full.
    CAPSOPS_DEVICE PassSequence now() const { return PassSequence(f, backward, progress(f)->step); }

    // Words of one input capsule: W of a tile of j, and u of 16 samples.
    CAPSOPS_DEVICE int w_words() const { return steps * (Groups::units * Math::w_quads * 4 * warp_size); }
    CAPSOPS_DEVICE int u_words() const { return steps * (Math::u_words * warp_size); }
    // Word n of the shared memory.
    CAPSOPS_DEVICE static uint32_t* shared_words(int n) {
        return reinterpret_cast<uint32_t*>(shared_memory()) + n;
    }
    // Where the group's ring of slots begins.
    CAPSOPS_DEVICE int ring() const { return group * ring_slots * tiling.slot_words; }
    // [groups, m_tiles, tiles, 32]; the same memory.
    CAPSOPS_DEVICE float4* block_sums() const { return reinterpret_cast<float4*>(shared_memory()); }
    CAPSOPS_DEVICE float4* own_sums() const {
        return block_sums() + (group * tiling.m_tiles + m) * (Groups::tiles * warp_size);
    }
    // V of the block's samples [m_tiles, tiles, 32], and backward ds.
    CAPSOPS_DEVICE float4* capsules() const {
        return reinterpret_cast<float4*>(shared_memory() + tiling.capsules_offset);
    }
    CAPSOPS_DEVICE float4* grad_s() const { return capsules() + tiling.m_tiles * Groups::tiles * warp_size; }

    // ---- the tile of work

    CAPSOPS_DEVICE const Progress& item() const { return *progress(f); }
    CAPSOPS_DEVICE void set_item(int n) const {
        const int splits = int(tiling.splits), tiles_j = int(tiling.tiles_j);
        const int tile = n / splits, split = n - tile * splits;  // of j and of samples
        const int tile_b = tiles_j == 1 ? tile : tile / tiles_j, tile_j = tile - tile_b * tiles_j;
        const int first_j = tile_j * tiling.tile_j;
        const int64_t stream = (int64_t(split) * tiling.cluster + cluster_rank()) * tiling.groups + group;
        const int first_i = int(smaller(stream * tiling.length, p.I));
        warp_barrier();
        if (lane == 0) {
            Progress& to = *progress(f);
            to.item = n, to.split = split, to.tile_j = tile_j, to.first_j = first_j;
            to.count_j = int(smaller(p.J - first_j, tiling.tile_j));
            to.b = tile_b * tiling.m_tiles * 16;
            to.first_i = first_i, to.end_i = int(smaller(first_i + tiling.length, p.I));
        }
        warp_barrier();
    }

    // What this lane copies next.
    struct Source {
        const uint32_t *w, *u;
    };
    CAPSOPS_DEVICE Source source(int remaining) const {
        const Progress& item = this->item();
        const int64_t i = item.end_i - remaining;
        return {f.weight + (i * tiling.tiles_j + item.tile_j) * w_words() + (m * warp_size + lane) * 4,
                f.u + (i * tiling.tiles_b * tiling.m_tiles + item.b / 16 + m) * u_words() + lane * 4};
    }

    // Every other part of W, beginning at `from.w` or one part later.
    template <int later>
    CAPSOPS_DEVICE void copy_w(const Source& from, uint32_t* to) const {
        constexpr int quads = 4 * warp_size, copies = Groups::units * Math::w_quads - later;
        const uint32_t* const w = from.w + later * quads;
        if constexpr (one_step) {
#pragma unroll
            for (int n = 0; n < copies; n += 2) {
                if (n + 1 < copies || later || m == 0) copy_async(to + n * quads, w + n * quads, true);
            }
        } else {
#pragma unroll 1
            for (int n = 0; n < w_words() - (m + later) * quads; n += 2 * quads)
                copy_async(to + n, w + n, true);
        }
    }

    // Begins to copy W and u of one input capsule to a slot: W with the other warps of the group.
    CAPSOPS_DEVICE void copy(Source& from, int slot) const {
        constexpr int quads = 4 * warp_size;  // words of a copy by a whole warp
        const int words = w_words();
        uint32_t* const to = shared_words(slot + lane * 4);
        // Two warps copy W, every other part each, or one copies both.
        if (m < 2) copy_w<0>(from, to + m * quads);
        if (tiling.m_tiles == 1) copy_w<1>(from, to + quads);
        uint32_t* const to_u = to + words + m * u_words();
        if constexpr (one_step) {
            if (lane * 4 < u_words()) copy_async(to_u, from.u, true);
        } else {
#pragma unroll 1
            for (int n = 0; n < u_words() - lane * 4; n += quads) copy_async(to_u + n, from.u + n, true);
        }
        from.w += int(tiling.tiles_j) * words;
        from.u += int(tiling.tiles_b) * tiling.m_tiles * u_words();
    }

    // Begins to copy the numbers of x, arranged, of the block's samples.
    CAPSOPS_DEVICE void copy_capsules(const float* x, float4* to) const {
        constexpr int numbers = Groups::tiles * warp_size;
        const Progress& item = this->item();
        const int64_t tile = int64_t(now().t) * tiling.tiles_b * tiling.m_tiles + item.b / 16;
        const float4* const from =
            reinterpret_cast<const float4*>(x) + (tile * tiling.tiles_j + item.tile_j) * numbers;
        const int to_next = int(tiling.tiles_j) * numbers;  // tile of samples
        for (int n = thread_index(); n < tiling.m_tiles * numbers; n += thread_count())
            copy_async(to + n, from + n / numbers * to_next + n % numbers, true);
    }

    // ---- one input capsule

    struct Registers {
        Tile v[Groups::tiles], sum[Groups::tiles];
        float closed[Groups::count];  // -infinity where the group has no output capsule for this lane
    };

    // u_hat of 4 tiles.
    template <bool plain>
    CAPSOPS_DEVICE void predict(Tile* to, int unit, const typename Math::Left& left, int slot) const {
        if constexpr (plain) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float4 x = own_sums()[(4 * unit + n) * warp_size + lane];
                to[n][0] += x.x, to[n][1] += x.y, to[n][2] += x.z, to[n][3] += x.w;
            }
        } else if constexpr (one_step) {
            Math::multiply(to, left, w_quads(slot, unit));
        } else {
#pragma unroll 1
            for (int s = 0; s < steps; ++s)
                Math::multiply(to, load_left(slot, s), w_quads(slot, s * Groups::units + unit));
        }
    }
    CAPSOPS_DEVICE typename Math::Left load_left(int slot, int s) const {
        return Math::left(
            shared_words(slot + w_words() + m * u_words() + (s * warp_size + lane) * Math::u_words));
    }
    CAPSOPS_DEVICE const Quad* w_quads(int slot, int unit) const {
        return reinterpret_cast<const Quad*>(shared_words(slot)) + unit * Math::w_quads * warp_size + lane;
    }

    // u_hat of two units, unit n in number n % 2. The products of a unit are made while another is used.
    struct UHat {
        Tile tiles[2][4];
    };
    template <bool plain>
    CAPSOPS_DEVICE void predict_next(UHat& u_hat, int unit, const typename Math::Left& left, int slot) const {
        Tile(&to)[4] = u_hat.tiles[unit % 2];
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k][0] = to[k][1] = to[k][2] = to[k][3] = 0.0f;
        predict<plain>(to, unit, left, slot);
    }

    // Calls function(unit, u_hat) for all units. Leaves the last two in u_hat.
    template <bool plain, typename Function>
    CAPSOPS_DEVICE void for_units(UHat& u_hat, const typename Math::Left& left, int slot,
                                  Function function) const {
        predict_next<plain>(u_hat, 0, left, slot);
#pragma unroll
        for (int unit = 0; unit < Groups::units; ++unit) {
            if (unit + 1 < Groups::units) predict_next<plain>(u_hat, unit + 1, left, slot);
            function(unit, u_hat.tiles[unit % 2]);
        }
    }

    // The same once more, from the last, of which the last two are in u_hat.
    template <bool plain, typename Function>
    CAPSOPS_DEVICE void for_units_backwards(UHat& u_hat, const typename Math::Left& left, int slot,
                                            Function function) const {
#pragma unroll
        for (int unit = Groups::units - 1; unit >= 0; --unit) {
            function(unit, u_hat.tiles[unit % 2]);
            if (unit >= 2) predict_next<plain>(u_hat, unit - 2, left, slot);
        }
    }

    // Writes all predictions of this warp for one input capsule to where its sums will be.
    CAPSOPS_DEVICE void predict_plainly(int i) const {
        const Progress& item = this->item();
        warp_barrier();
#pragma unroll 1
        for (int tile = 0; tile < Groups::tiles; ++tile) {
            const auto at = Groups::position(tile, lane);
            float numbers[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int b = item.b + 16 * m + lane / 4 + e / 2 * 8, d = at.d + e % 2;
                const bool valid = b < int(p.B) && at.j < item.count_j && d < int(p.D);
                numbers[e] = valid ? plain_prediction<S>(p, b, i, item.first_j + at.j, d) : 0.0f;
            }
            own_sums()[tile * warp_size + lane] = make_float4(numbers[0], numbers[1], numbers[2], numbers[3]);
        }
        warp_barrier();
    }

    // e^x / 2^shift. An error of `shift` is the same for all output capsules.
    CAPSOPS_DEVICE static float exponential(float x, float shift) {
        return power_of_2(fmaf(x, log2_e, -shift));
    }

    // The sum over the lanes that share an output capsule of the group.
    CAPSOPS_DEVICE static float group_sum(float x, int group) { return lane_sum(x, 4 / Groups::size(group)); }

    // Sample 0 or 1 of this lane.
    CAPSOPS_DEVICE int64_t sample(int r) const { return item().b + 16 * m + opaque(lane) / 4 + 8 * r; }

    // The maximum and sums over the tiles of j, for one sample; the four lanes of a quad call it together.
    CAPSOPS_DEVICE Softmax of_all_tiles(int64_t b, int i) const {
        Softmax all{-INFINITY, 0.0f, 0.0f};
#pragma unroll 1
        for (int tile = lane % 4; tile < int(tiling.tiles_j) && b < p.B; tile += 4) {
            const Softmax* const x = f.tile_softmax + (int64_t(tile) * p.I + i) * p.B + b;
            add(all,
                {load_bypassing_l1(&x->largest), load_bypassing_l1(&x->sum), load_bypassing_l1(&x->mean)});
        }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
            add(all,
                {shuffle_xor(all.largest, mask), shuffle_xor(all.sum, mask), shuffle_xor(all.mean, mask)});
        }
        all.mean *= reciprocal(all.sum);
        return all;
    }
    CAPSOPS_DEVICE static void add(Softmax& to, const Softmax& x) {
        const float largest = fmaxf(to.largest, x.largest);
        const float shrink = to.largest == largest ? 1.0f : exponential(to.largest, largest * log2_e);
        const float grow = x.largest == largest ? 1.0f : exponential(x.largest, largest * log2_e);
        to = {largest, to.sum * shrink + x.sum * grow, to.mean * shrink + x.mean * grow};
    }

    // Adds the input capsule that is `remaining` before the end of the group's range.
    template <bool plain>
    CAPSOPS_DEVICE void add(Registers& own, int slot, int remaining) const {
        typename Math::Left left{};
        if constexpr (!plain && one_step) left = load_left(slot, 0);
        if constexpr (step == Step::uniform) {
#pragma unroll
            for (int unit = 0; unit < Groups::units; ++unit)
                predict<plain>(own.sum + 4 * unit, unit, left, slot);
            return;
        }
        float c[2][Groups::count], a[2][Groups::count], x[4], y[4];
        UHat all;
        for_units<plain>(all, left, slot, [&](int unit, const Tile(&u_hat)[4]) {
            const int n = unit / N;
            if (unit % N == 0) {
#pragma unroll
                for (int e = 0; e < 4; ++e) x[e] = e % 2 == 0 ? own.closed[n] : 0.0f, y[e] = 0.0f;
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int tile = 4 * unit + k;
#pragma unroll
                for (int e = 0; e < 4; ++e) x[e] += u_hat[k][e] * own.v[tile][e];
                if constexpr (backward) {
                    const float4 ds = grad_s()[(m * Groups::tiles + tile) * warp_size + lane];
                    // In two parts, as x, where there are registers for it.
                    y[0] += u_hat[k][0] * ds.x, y[one_step] += u_hat[k][1] * ds.y;
                    y[2] += u_hat[k][2] * ds.z, y[2 + one_step] += u_hat[k][3] * ds.w;
                }
            }
            if (unit % N + 1 < N * Groups::size(n) / 4) return;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                c[r][n] = group_sum(x[2 * r] + x[2 * r + 1], n);
                if constexpr (backward) a[r][n] = group_sum(y[2 * r] + y[2 * r + 1], n);
            }
        });
        Softmax softmax[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            Softmax& s = softmax[r];
            const bool leaky = p.leaky && (step == Step::whole || item().tile_j == 0);
            if constexpr (step == Step::of_all_tiles) {
                s = of_all_tiles(sample(r), item().end_i - remaining);
#pragma unroll
                for (int n = 0; n < Groups::count; ++n) c[r][n] = exponential(c[r][n], s.largest * log2_e);
            } else {
                s = {leaky ? 0.0f : -INFINITY, 0.0f, 0.0f};
#pragma unroll
                for (int n = 0; n < Groups::count; ++n) s.largest = fmaxf(s.largest, c[r][n]);
                s.largest = lane_max(s.largest, 4);
#pragma unroll
                for (int n = 0; n < Groups::count; ++n) {
                    c[r][n] = exponential(c[r][n], s.largest * log2_e);
                    // The lanes that share an output capsule all have it.
                    const float own_part = c[r][n] * (Groups::size(n) / 4.0f);
                    s.sum += own_part;
                    if constexpr (backward) s.mean += own_part * a[r][n];
                }
                s.sum = lane_sum(s.sum, 4);
                if constexpr (backward) s.mean = lane_sum(s.mean, 4);
                if (leaky) s.sum += exponential(0.0f, s.largest * log2_e);
                if constexpr (step == Step::of_tile) {
                    if (opaque(lane) % 4 == 0 && sample(r) < p.B)
                        f.tile_softmax[(item().tile_j * p.I + item().end_i - remaining) * p.B + sample(r)] =
                            s;
                    continue;
                }
                s.mean *= reciprocal(s.sum);
            }
            if (backward && p.softmax != nullptr && opaque(lane) % 4 == 0 &&
                (step == Step::whole || item().tile_j == 0) && sample(r) < p.B)
                p.softmax[p.softmax_at(now().t, sample(r), item().end_i - remaining)] = s;
            const float inverse = reciprocal(s.sum);
#pragma unroll
            for (int n = 0; n < Groups::count; ++n) c[r][n] *= inverse;
        }
        if constexpr (step == Step::of_tile) return;
        if (backward ? p.detach : f.couplings && now().t + 1 == p.iterations) {
            if (f.couplings) write_couplings(c, item().end_i - remaining);
            return;
        }
        warp_barrier();  // so that the compiler does not keep W in registers
        if constexpr (backward) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int n = 0; n < Groups::count; ++n) c[r][n] *= a[r][n] - softmax[r].mean;
            }
        }
        for_units_backwards<plain>(all, left, slot, [&](int unit, const Tile(&u_hat)[4]) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int e = 0; e < 4; ++e) own.sum[4 * unit + k][e] += c[e / 2][unit / N] * u_hat[k][e];
            }
        });
    }

    CAPSOPS_DEVICE void write_couplings(const float (&c)[2][Groups::count], int i) const {
        const Progress& item = this->item();
#pragma unroll
        for (int n = 0; n < Groups::count; ++n) {
            const int G = Groups::size(n), own_lane = opaque(lane), j = 4 * n + own_lane % 4 * G / 4;
            if (own_lane % (4 / G) != 0 || j >= item.count_j) continue;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t b = sample(r);
                if (b >= p.B) continue;
                narrow(c[r][n], static_cast<S*>(p.couplings)[(b * p.I + i) * p.J + item.first_j + j]);
            }
        }
    }

    // ---- all input capsules of an item

    CAPSOPS_DEVICE void clear(Registers& own) const {
#pragma unroll
        for (int tile = 0; tile < Groups::tiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) own.sum[tile][e] = 0.0f;
        }
    }

    CAPSOPS_DEVICE void load_capsules(Registers& own) const {
        clear(own);
        if constexpr (step != Step::uniform) {
#pragma unroll
            for (int tile = 0; tile < Groups::tiles; ++tile) {
                const float4 x = capsules()[(m * Groups::tiles + tile) * warp_size + lane];
                own.v[tile][0] = x.x, own.v[tile][1] = x.y, own.v[tile][2] = x.z, own.v[tile][3] = x.w;
            }
#pragma unroll
            for (int n = 0; n < Groups::count; ++n) {
                own.closed[n] =
                    opaque(4 * n + lane % 4 * Groups::size(n) / 4 < item().count_j ? 0.0f : -INFINITY);
            }
        }
    }

    CAPSOPS_DEVICE bool all_finite(const Registers& own) const {
        float zero = 0.0f;
#pragma unroll
        for (int tile = 0; tile < Groups::tiles; ++tile) {
#pragma unroll
            for (int e = 0; e < 4; ++e) zero += own.sum[tile][e] * 0.0f;
        }
        return !any_lane(zero != 0.0f);
    }

    CAPSOPS_DEVICE void run_item() const {
        int remaining = item().end_i - item().first_i;
        // All groups of the block have the same samples.
        if constexpr (step != Step::uniform) copy_capsules(p.arranged.v, capsules());
        if constexpr (backward) copy_capsules(p.arranged.grad_s, grad_s());
        commit_copies();
        Source next = source(remaining);
#pragma unroll
        for (int n = 0; n + 1 < ring_slots; ++n) {
            if (n < remaining) copy(next, ring() + n * tiling.slot_words);
            commit_copies();
        }
        wait_for_older_copies(ring_slots - 1);
        block_barrier();
        Registers own;
        load_capsules(own);
        int slot = ring();
#pragma unroll 1
        for (; remaining > 0; --remaining) {
            const int all = ring_slots * tiling.slot_words, after = slot + tiling.slot_words;
            wait_for_older_copies(ring_slots - 2);
            group_barrier(group, tiling.m_tiles * warp_size);
            if (remaining >= ring_slots) {
                if constexpr (!one_step)
                    next = source(remaining - (ring_slots - 1));  // not kept in registers
                copy(next, slot == ring() ? slot + all - tiling.slot_words : slot - tiling.slot_words);
            }
            commit_copies();
            add<false>(own, slot, remaining);
            slot = after == ring() + all ? ring() : after;
        }
        wait_for_copies();
        block_barrier();  // the slots become sums
        if constexpr (Math::exact && step != Step::of_tile) {
            if (!all_finite(own)) add_plainly(own);
        }
        if constexpr (step != Step::of_tile) {
            if (now().sums) add_up(own);
        }
        block_barrier();  // before the next item's copies
    }

    CAPSOPS_DEVICE void add_plainly(Registers& own) const {
        clear(own);
#pragma unroll 1
        for (int remaining = item().end_i - item().first_i; remaining > 0; --remaining) {
            predict_plainly(item().end_i - remaining);
            add<true>(own, 0, remaining);
        }
    }

    // Adds up the sums of the groups and of the cluster's blocks, each in a fixed order.
    CAPSOPS_DEVICE void add_up(const Registers& own) const {
        const int count = tiling.m_tiles * Groups::tiles * warp_size;
        float4* const all = block_sums();
#pragma unroll
        for (int tile = 0; tile < Groups::tiles; ++tile) {
            const Tile& x = own.sum[tile];
            own_sums()[tile * warp_size + lane] = make_float4(x[0], x[1], x[2], x[3]);
        }
        block_barrier();
        for (int n = thread_index(); n < count; n += thread_count())
            all[n] = sum_of(tiling.groups, [&](int other) { return all[other * count + n]; });
        cluster_barrier();
        const int rank = cluster_rank(), begin = count * rank / tiling.cluster,
                  end = count * (rank + 1) / tiling.cluster;
        for (int n = begin + thread_index(); n < end; n += thread_count())
            store_partial(sum_of(tiling.cluster, [&](int other) { return load_of_cluster(all + n, other); }),
                          n);
        cluster_barrier();  // before a block's sums are overwritten
    }
    // x(0) + x(1) + ...; four numbers are loaded at a time.
    template <typename Function>
    CAPSOPS_DEVICE static float4 sum_of(int count, Function x) {
        if (count % 4 != 0) {
            float4 sum = x(0);
#pragma unroll 1
            for (int n = 1; n < count; ++n) sum = plus(sum, x(n));
            return sum;
        }
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int n = 0; n < count; n += 4) {
            const float4 a = x(n), b = x(n + 1), c = x(n + 2), d = x(n + 3);
            sum = plus(plus(plus(plus(sum, a), b), c), d);
        }
        return sum;
    }
    CAPSOPS_DEVICE static float4 plus(const float4& x, const float4& y) {
        return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    }

    CAPSOPS_DEVICE void store_partial(const float4& sum, int n) const {
        const Progress& item = this->item();
        const int own_lane = n % warp_size, tile = n / warp_size % Groups::tiles;
        const auto at = Groups::position(tile, own_lane);
        if (at.j >= item.count_j) return;
        const float numbers[2][2] = {{sum.x, sum.y}, {sum.z, sum.w}},
                    scale = step == Step::uniform ? p.first : 1.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int64_t b = item.b + n / warp_size / Groups::tiles * 16 + own_lane / 4 + 8 * r;
            if (b >= p.B) continue;
            float* const to =
                p.partial + item.split * p.capsules() + (b * p.J + item.first_j + at.j) * p.D + at.d;
            if (at.d < int(p.D)) to[0] = numbers[r][0] * scale;
            if (at.d + 1 < int(p.D)) to[1] = numbers[r][1] * scale;
        }
    }

    CAPSOPS_DEVICE void run() const {
        set_item(cluster_index());
        while (item().item < int(tiling.items)) {
            run_item();
            set_item(item().item + cluster_count());
        }
    }
};

// Writes 0 to the numbers of V and ds, arranged, that belong to no sample, capsule or component.
template <typename Groups>
CAPSOPS_DEVICE void clear_padding(const Routing& p, const PassTiling& tiling) {
    for_warps(p.arranged.numbers / warp_size, [&](int64_t n) {
        const int e = lane_index() % 4, tile = int(n / 4 % Groups::tiles);
        const int64_t item = n / 4 / Groups::tiles, at = n * warp_size + lane_index();
        const int lane = int(n % 4) * 8 + lane_index() / 4;
        const auto position = Groups::position(tile, lane);
        const int64_t b = item / tiling.tiles_j % p.arranged.tiles_b * 16 + lane / 4 + e / 2 * 8,
                      j = item % tiling.tiles_j * tiling.tile_j + position.j;
        if (b < p.B && position.j < tiling.tile_j && j < p.J && position.d + e % 2 < p.D) return;
        p.arranged.v[at] = 0.0f;
        if (p.backward) p.arranged.grad_s[at] = 0.0f;
    });
}

// Arranges the operands, all warps of the grid together.
template <typename Math, typename Groups>
CAPSOPS_DEVICE void arrange(const Passes& f) {
    typedef typename Math::S S;
    const Routing& p = f.p;
    const PassTiling& tiling = f.tiling;
    const int steps = tiling.steps, m_tiles = int(tiling.tiles_b) * tiling.m_tiles;
    for_warps(p.I * m_tiles * steps, [&](int64_t n) {
        const int64_t i = n / steps / m_tiles, b = n / steps % m_tiles * 16,
                      first_k = n % steps * Math::depth;
        uint32_t* const to = f.u + (n * warp_size + lane_index()) * Math::u_words;
#pragma unroll
        for (int word = 0; word < Math::u_words; ++word) {
            to[word] = Math::arrange_u(
                [&](int row, int k) {
                    const bool valid = b + row < p.B && first_k + k < p.K;
                    return valid ? load<S>(p.u, ((b + row) * p.I + i) * p.K + first_k + k) : 0.0f;
                },
                word);
        }
    });
    constexpr int parts = Math::w_quads / Math::w_parts;
    const int64_t quads = int64_t(steps) * Groups::units * parts;
    for_warps(p.I * tiling.tiles_j * quads, [&](int64_t n) {
        const int part = int(n % parts), unit = int(n / parts % Groups::units);
        const int64_t first_k = n / parts / Groups::units % steps * Math::depth;
        const int64_t tile_j = n / quads % tiling.tiles_j, i = n / quads / tiling.tiles_j;
        const int64_t first_j = tile_j * tiling.tile_j;
        const int count_j = int(smaller(p.J - first_j, tiling.tile_j));
        Quad to[Math::w_parts];
        Math::arrange_w(
            [&](int tile, int row, int k) {
                const auto at = Groups::row_position(4 * unit + tile, row);
                const bool valid = at.j < count_j && at.d < int(p.D) && first_k + k < p.K;
                const int64_t w = ((i * p.J + first_j + at.j) * p.D + at.d) * p.K + first_k + k;
                return valid ? load<S>(p.weight, w) : 0.0f;
            },
            part, to);
        Quad* const all = reinterpret_cast<Quad*>(f.weight) + n * Math::w_parts * warp_size + lane_index();
#pragma unroll
        for (int w = 0; w < Math::w_parts; ++w) all[w * warp_size] = to[w];
    });
}

template <typename Math, typename Groups, bool one_step, bool backward>
CAPSOPS_DEVICE void run_pass(const Passes& f, Step step) {
    switch (step) {
        case Step::uniform:
            if constexpr (!backward) Pass<Math, Groups, one_step, backward, Step::uniform>(f).run();
            return;
        case Step::whole:
            return Pass<Math, Groups, one_step, backward, Step::whole>(f).run();
        case Step::of_tile:
            return Pass<Math, Groups, one_step, backward, Step::of_tile>(f).run();
        case Step::of_all_tiles:
            return Pass<Math, Groups, one_step, backward, Step::of_all_tiles>(f).run();
    }
}

CAPSOPS_DEVICE void set_step(const Passes& f, int step) {
    warp_barrier();
    if (lane_index() == 0) progress(f)->step = step;
    warp_barrier();
}

// All steps in one launch if its blocks run at the same time; the grid waits at a barrier between steps.
template <typename Math, typename Groups, bool one_step, bool backward>
CAPSOPS_KERNEL(max_pass_warps* warp_size, 1)
passes_kernel(CAPSOPS_PARAMETER Passes f) {
    typedef typename Math::S S;
    for (set_step(f, f.first_step); progress(f)->step < f.last_step; set_step(f, progress(f)->step + 1)) {
        if (progress(f)->step > f.first_step) grid_barrier();
        const PassSequence now(f, backward, progress(f)->step);
        if (now.begins) {
            if (f.prepares) {
                clear_padding<Groups>(f.p, f.tiling);
                arrange<Math, Groups>(f);
            }
            if constexpr (backward) begin_backward<S>(f.p);
        } else if (now.finishes) {
            if constexpr (backward) {
                finish_backward(f.p, now.t);
            } else {
                finish_forward<S>(f.p, now.t);
            }
        } else if (now.step != Step::uniform || now.sums) {
            run_pass<Math, Groups, one_step, backward>(f, now.step);
        }
    }
}

}  // namespace capsops
