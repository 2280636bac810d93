#include "plan.h"

#include <algorithm>

#include "common/integers.h"

namespace capsops {
namespace {

int64_t aligned(int64_t bytes) { return round_up(bytes, 16); }

// Rows are an odd multiple of 8 numbers apart, so that 8 rows begin in 8 different groups of banks.
int row_stride(int64_t K) {
    const int64_t eights = divide_up(K, 8);
    return int(8 * (eights % 2 == 0 ? eights + 1 : eights));
}

bool plan_common(const FusedShape& shape, Tiling& to) {
    to.n = tiles_of_d(shape.D);
    // The kernels count samples, capsules and items of work in 32 bits.
    if (to.n == 0 || shape.K > 1024 || shape.B >= 1 << 24 || shape.J >= 1 << 16 || shape.I >= 1 << 30)
        return false;
    to.steps = shape.precomputed ? 0 : int(divide_up(shape.K, 8));
    // Predictions are read in whole tiles, of which D may fill only three if there are four.
    to.stride = row_stride(shape.precomputed ? 8 * to.n : shape.K);
    return true;
}

}  // namespace

bool plan_precomputed_passes(const FusedShape& shape, const FusedLimits& limits, int resident_blocks,
                             Tiling& to) {
    if (!plan_common(shape, to)) return false;
    to.m = to.n == 4 ? 1 : 2;
    to.tiles_j = divide_up(shape.J, max_warps);
    to.tile_j = int(divide_up(shape.J, to.tiles_j));
    const int64_t samples = 16 * to.m, groups = divide_up(shape.B, samples);
    to.groups = int(std::max<int64_t>(1, std::min<int64_t>(max_warps / to.tile_j, groups)));
    to.warps = to.tile_j * to.groups;
    const int64_t rows = samples * to.groups;
    to.tiles_b = divide_up(shape.B, rows);
    const int64_t tiles = to.tiles_b * to.tiles_j;
    const int64_t blocks = int64_t(limits.multiprocessors) * std::max(resident_blocks, 1);
    // The number of splits that minimises the time: rounds of blocks times the length of a split plus a fixed
    // cost.
    const int64_t max_splits = std::min(std::max<int64_t>(blocks / tiles, 8), shape.I);
    double best = 0;
    for (int64_t splits = 1; splits <= max_splits; ++splits) {
        const int64_t length = divide_up(shape.I, splits);
        const double cost =
            double(divide_up(tiles * divide_up(shape.I, length), blocks)) * double(length + 4);
        if (best == 0 || cost < best) best = cost, to.length = length;
    }
    to.splits = divide_up(shape.I, to.length);
    to.items = tiles * to.splits;
    if (to.items >= 1 << 30) return false;
    // Two blocks on a multiprocessor hide each other's latencies, so a chunk takes half of the memory if
    // possible.
    for (const int64_t bytes : {limits.shared_per_block / 2 - 1024, limits.shared_per_block}) {
        for (int chunk = 8; chunk > 0; chunk /= 2) {
            to.chunk = int(divide_up(to.length, divide_up(to.length, chunk)));
            to.stage = aligned(to.chunk * to.tile_j * rows * to.stride * shape.element);
            const int64_t logits = to.chunk * to.tile_j * rows * 4, softmax = to.chunk * rows * 12;
            to.shared = 2 * to.stage + 2 * logits + softmax;
            if (to.shared <= bytes) return true;
        }
    }
    return false;
}

bool plan_pass_tiles(const PassShape& shape, const FusedLimits& limits, PassTiling& to) {
    to.n = tiles_of_d(shape.D);
    // The kernels count samples, capsules and items of work in 32 bits.
    if (to.n == 0 || shape.K > 1024 || shape.B >= 1 << 24 || shape.J >= 1 << 16 || shape.I >= 1 << 30)
        return false;
    to.steps = int(divide_up(shape.K, shape.depth));
    constexpr int64_t progress = max_pass_warps * progress_bytes;
    const int64_t most = divide_up(shape.J, capsules_of_warp(to.n, false));
    const int64_t most_m_tiles = smaller(divide_up(shape.B, 16), max_pass_warps);
    // Few output capsules if that takes no more tiles, or if W of more does not fit in shared memory.
    for (const bool few : {to.n == 2 && divide_up(shape.J, capsules_of_warp(2, true)) == most, to.n == 2}) {
        to.few = few;
        to.tiles_j = divide_up(shape.J, capsules_of_warp(to.n, few));
        to.tile_j = int(divide_up(shape.J, to.tiles_j));
        const int64_t tiles = int64_t(to.n) * capsules_of_warp(to.n, few);
        const int64_t w_words = to.steps * tiles / 4 * shape.w_quads * 128,
                      u_words = to.steps * shape.u_words * 32;
        int warps = 0;
        // Two tiles of samples share W; more only if so many slots of W do not fit.
        for (int m_bits = most_m_tiles > 1; 1 << m_bits < 2 * most_m_tiles; ++m_bits) {
            const int m_tiles = 1 << m_bits;
            const int64_t slot = round_up(w_words + m_tiles * u_words, 4), sums = tiles * 512;
            const int64_t capsules = (shape.backward ? 2 : 1) * m_tiles * sums;
            const int64_t of_group = larger(ring_slots * slot * 4, m_tiles * sums);
            const int64_t groups =
                smaller((limits.shared_per_block - capsules - progress) / of_group, max_pass_warps / m_tiles);
            if (groups < 1 || groups * m_tiles <= warps) continue;
            warps = int(groups) * m_tiles;
            to.m_tiles = m_tiles, to.m_bits = m_bits, to.groups = int(groups), to.slot_words = int(slot);
            to.tiles_b = divide_up(shape.B, 16 * m_tiles);
            to.capsules_offset = larger(groups * ring_slots * slot * 4, groups * m_tiles * sums);
            to.progress_offset = to.capsules_offset + capsules;
            to.shared = to.progress_offset + progress;
        }
        // The kernels count items of work in 32 bits, and words from one input capsule to the next.
        constexpr int64_t most_items = int64_t(1) << 30, most_words = int64_t(1) << 31;
        if (warps > 0 && 8 * to.tiles_b * to.tiles_j < most_items &&
            to.tiles_b * to.m_tiles * u_words < most_words && to.tiles_j * w_words < most_words)
            return true;
    }
    return false;
}

void divide_input_capsules(const PassShape& shape, const int (&resident_clusters)[4], PassTiling& to) {
    const int64_t tiles = to.tiles_b * to.tiles_j;
    double best = 0;
    for (int n = 3; n >= 0; --n) {
        const int64_t cluster = 1 << n, clusters = resident_clusters[n], at_once = cluster * to.groups;
        if (clusters < 1 || (n > 0 && at_once / 2 >= shape.I)) continue;
        const int64_t most_splits = smaller(larger(clusters / tiles, 8), divide_up(shape.I, at_once));
        for (int64_t wanted = 1; wanted <= most_splits; ++wanted) {
            const int64_t length = divide_up(shape.I, at_once * wanted);
            const int64_t splits = divide_up(shape.I, at_once * length);
            // The time in input capsules of a group: rounds of items, each with a fixed cost, and the partial
            // sums, which are read afterwards.
            const double cost =
                double(divide_up(tiles * splits, clusters)) * double(length + 4) + 0.1 * double(splits);
            if (best != 0 && cost >= best) continue;
            best = cost;
            to.cluster = int(cluster), to.length = length, to.splits = splits, to.items = tiles * splits;
        }
    }
}

bool plan_gradients(const FusedShape& shape, const FusedLimits& limits, Tiling& to) {
    if (!plan_common(shape, to)) return false;
    to.m = to.n * (shape.passes > 2 ? 9 : 5) > 10 ? 1 : 2;
    to.groups = 1;
    const int64_t rows = 16 * to.m, row_bytes = shape.precomputed ? 0 : int64_t(to.stride) * shape.element;
    const int64_t slot = std::max<int64_t>(2 * shape.passes * rows, to.m * to.steps * 128);
    if (slot * 4 > limits.shared_per_block) return false;
    to.slot = int(slot);
    to.tiles_b = divide_up(shape.B, rows);
    const int warp_limit = max_gradient_warps(shape.tensor_cores || shape.precomputed);
    double best = 0;
    Tiling tiling = to;
    // Few tiles of j first, since every tile reads u again and makes a part of du that has to be summed
    // later.
    for (int64_t tiles_j = 1; tiles_j <= shape.J && best == 0; ++tiles_j) {
        tiling.tile_j = int(divide_up(shape.J, tiles_j));
        if (divide_up(shape.J, tiling.tile_j) != tiles_j) continue;
        tiling.tiles_j = tiles_j;
        tiling.warps = int(divide_up(tiling.tile_j, divide_up(tiling.tile_j, warp_limit)));
        for (int64_t chunk = std::min<int64_t>(shape.I, 16); chunk > 0; --chunk) {
            tiling.chunk = int(chunk);
            const int64_t weights = aligned(chunk * tiling.tile_j * to.n * 8 * row_bytes);
            const int64_t grad_w = chunk * tiling.tile_j * divide_up(to.n, 2) * to.steps * 512;
            const int64_t slots = tiling.tile_j * chunk * slot * 4;
            tiling.stage = aligned(chunk * rows * row_bytes);
            tiling.shared = 2 * tiling.stage + weights + grad_w + slots;
            if (tiling.shared > limits.shared_per_block) continue;
            const int64_t items = divide_up(shape.I, chunk) * tiles_j;
            // The batch is split only if there are too few items otherwise, since the parts of dW have to be
            // summed later.
            const int64_t splits = std::min(std::max<int64_t>(limits.multiprocessors / items, 1), to.tiles_b);
            tiling.length = divide_up(to.tiles_b, splits);
            tiling.splits = divide_up(to.tiles_b, tiling.length);
            tiling.items = items * tiling.splits;
            // The time of one multiprocessor: rounds of items, each with a fixed cost besides that of its
            // chunk.
            const double rounds = double(divide_up(tiling.items, limits.multiprocessors));
            const double cost = rounds * double(tiling.length) * (double(chunk) + 0.5);
            if (best == 0 || cost < best) best = cost, to = tiling;
        }
    }
    return best > 0;
}

bool plan_smem_cached(const FusedShape& shape, const FusedLimits& limits, SmemCachedTiling& to) {
    if (!shape.precomputed || shape.passes < 1 || shape.J > max_smem_cached_j || shape.D > 32 ||
        shape.I >= 1 << 20)
        return false;
    const int64_t rounds = divide_up(shape.B, limits.multiprocessors);
    if (3 * shape.B < 2 * rounds * limits.multiprocessors) return false;
    to.parts = shape.D <= 8 ? 2 : shape.D <= 16 ? 4 : 8;
    // Input capsules are an odd number of vectors apart, or on tensor cores of 16 bytes, so that they begin
    // in different banks.
    const bool tensor_cores = smem_cached_on_tensor_cores(shape.element, to.parts);
    to.row = int(tensor_cores ? shape.J * 16 + 8 : (shape.J | 1) * 4 * to.parts);
    const int64_t set_size = tensor_cores ? 16 : 32 / to.parts, sums = shape.J * 4 * to.parts * 4;
    to.sets = int(divide_up(shape.I, set_size));
    to.warps = std::min(to.sets, max_smem_cached_warps);
    const int64_t left = limits.shared_per_block - (to.warps + 2) * sums;
    const int64_t slot = set_size * to.row * shape.element;
    to.slots = int(std::min<int64_t>({left / (to.warps * slot), divide_up(to.sets, to.warps), max_slots}));
    if (to.slots < 1 || (to.slots < 3 && to.slots * to.warps < to.sets)) return false;
    to.ring = aligned(to.warps * to.slots * slot);
    to.shared = to.ring + (to.warps + 2) * sums;
    return true;
}

}  // namespace capsops
