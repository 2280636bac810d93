// How the fused kernels divide the work: plain host code.
//
// A warp has one output capsule j and 16 * m samples of the batch. The warps of a block have `tile_j` output
// capsules and `groups` times as many samples; they loop over `length` input capsules i, `chunk` at a time.
// Shared memory contains two stages of u and W, one of which is copied while the other is used, and the
// logits of a chunk.
#pragma once

#include <cstdint>

namespace capsops {

struct FusedShape {
    int64_t B, I, J, D, K;
    int element;  // bytes of a number in u and W
    bool tensor_cores;
    bool precomputed;  // the predictions are precomputed: no u and W, and K is ignored
    int passes;        // with logits
};

struct FusedLimits {
    int multiprocessors;
    int64_t shared_per_block;
};

// The plan of the passes or of the gradients.
struct Tiling {
    int n;       // tiles of 8 components of an output capsule: 1, 2 or 4
    int m;       // tiles of 16 samples in a warp
    int groups;  // of warps along the batch
    int tile_j;  // output capsules per block
    int warps;   // per block
    int chunk;   // input capsules at a time
    int steps;   // 8 components of an input capsule each
    int stride;  // numbers between rows of u and W, or of predictions, in shared memory
    int slot;    // gradients: numbers of shared memory for one input and one output capsule
    int64_t tiles_b, tiles_j, splits;
    int64_t length;  // of a split: input capsules (passes) or tiles of samples (gradients)
    int64_t stage;   // bytes of one stage
    int64_t shared;  // bytes of shared memory per block
    int64_t items;   // items of work; a block processes one at a time
};

constexpr int max_warps = 12;  // per block of the passes: up to 168 registers per thread

// Per block of the gradients: up to 168 registers per thread, or 255 for products by multiply-adds.
constexpr int max_gradient_warps(bool few_registers) { return few_registers ? 12 : 8; }

// The plan of dynamic_routing with a block for each sample (smem_cached.cu).
struct SmemCachedTiling {
    int parts;       // lanes that share a vector
    int row;         // numbers between input capsules in shared memory
    int sets;        // per sample, each of 32 / parts input capsules
    int warps;       // that share the sets
    int slots;       // in the ring of a warp, each for one set
    int64_t ring;    // bytes of all slots
    int64_t shared;  // bytes of shared memory per block
};

// Whether the logits are computed by tensor cores, in products of depth 16.
constexpr bool smem_cached_on_tensor_cores(int element, int parts) { return element == 2 && parts == 4; }

constexpr int max_smem_cached_warps = 12;
constexpr int max_smem_cached_j = 10;
constexpr int max_slots = 8;

inline int tiles_of_d(int64_t D) { return D <= 8 ? 1 : D <= 16 ? 2 : D <= 32 ? 4 : 0; }

// Plan the passes or the gradients. Return false if the fused kernels do not support the shape on such a
// device.
bool plan_passes(const FusedShape& shape, const FusedLimits& limits, int resident_blocks, Tiling& to);
bool plan_gradients(const FusedShape& shape, const FusedLimits& limits, Tiling& to);

// Also returns false if there are too few samples to keep the device busy.
bool plan_smem_cached(const FusedShape& shape, const FusedLimits& limits, SmemCachedTiling& to);

}  // namespace capsops
