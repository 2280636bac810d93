// How the fused kernels divide the work: plain host code.
//
// A warp has one output capsule j and `samples` of the batch; the warps of a block have `tile_j` output
// capsules and `groups` times as many samples, and go through a length of input capsules i, `chunk` at a
// time. Shared memory holds two stages of u and W, so that one is copied while the other is worked on, and
// the logits of a chunk.
#pragma once

#include <cstdint>

namespace capsops {

struct FusedShape {
    int64_t B, I, J, D, K;
    int element;  // bytes of a number in u and W
    bool tensor_cores;
    bool precomputed;  // the predictions are: no u and W, K does not matter
    int passes;        // with logits
};

struct FusedLimits {
    int multiprocessors;
    int64_t shared_per_block;
};

// What both fused kernels have in common.
struct Tiling {
    int n;       // tiles of 8 components of an output capsule: 1, 2 or 4
    int m;       // tiles of 16 samples in a warp
    int groups;  // of warps along the batch
    int tile_j;  // output capsules of a block
    int warps;   // of a block
    int chunk;   // input capsules at a time
    int steps;   // 8 components of an input capsule each
    int stride;  // numbers between rows of u and W, or of predictions, in shared memory
    int slot;    // gradients: numbers for what one input and one output capsule exchange
    int64_t tiles_b, tiles_j, splits,
        length;      // length: input capsules (passes) or samples (gradient) of a split
    int64_t stage;   // bytes of one stage
    int64_t shared;  // bytes of shared memory of a block
    int64_t items;   // of work, each for one block at a time
};

constexpr int most_warps = 12;  // of a block of the passes: up to 168 registers a thread

// Of a block of the gradients: up to 168 registers a thread, 255 for products by multiply-adds.
constexpr int most_gradient_warps(bool few_registers) { return few_registers ? 12 : 8; }

// Of dynamic_routing with a block for each sample (smem_cached.cu).
struct SmemCachedTiling {
    int parts;       // lanes to a vector
    int row;         // numbers between input capsules in shared memory
    int sets;        // of 32 / parts input capsules, of a sample
    int warps;       // that share them
    int slots;       // of a warp's ring, a set each
    int64_t ring;    // bytes of all slots
    int64_t shared;  // bytes of shared memory of a block
};

// Logits by products of depth 16.
constexpr bool smem_cached_on_tensor_cores(int element, int parts) { return element == 2 && parts == 4; }

constexpr int max_smem_cached_warps = 12;
constexpr int max_smem_cached_j = 10;
constexpr int most_slots = 8;

inline int tiles_of_d(int64_t D) { return D <= 8 ? 1 : D <= 16 ? 2 : D <= 32 ? 4 : 0; }

// Plans of the passes and of the gradients. False where the fused kernels do not serve the shape on such a
// device.
bool plan_passes(const FusedShape& shape, const FusedLimits& limits, int resident_blocks, Tiling& to);
bool plan_gradients(const FusedShape& shape, const FusedLimits& limits, Tiling& to);

// False as well where the samples leave much of the device without work.
bool plan_smem_cached(const FusedShape& shape, const FusedLimits& limits, SmemCachedTiling& to);

}  // namespace capsops
