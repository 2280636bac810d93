// How the kernels of routing divide the work: plain host code.
//
// In the passes over precomputed predictions a warp has one output capsule j and 16 * m samples of the batch.
// The warps of a block have `tile_j` output capsules and `groups` times as many samples; they loop over
// `length` input capsules i, `chunk` at a time. Shared memory contains two stages of predictions, one of
// which is copied while the other is used, and the logits of a chunk.
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

// The plan of the passes over precomputed predictions or of the gradients.
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

// How the passes (passes.h) divide the work. A warp has 16 samples and a tile of output capsules; the warps
// of a block are `groups` groups of `m_tiles` warps; a group goes through `length` input capsules.
struct PassShape {
    int64_t B, I, J, D, K;
    int depth, w_quads, u_words;  // of the way to multiply (operands.h)
    bool backward;
};

struct PassTiling {
    int n;                        // tiles of 8 components of an output capsule: 1, 2 or 4
    bool few;                     // whether a warp has fewer output capsules than its registers allow
    int tile_j;                   // output capsules of a warp
    int m_tiles, m_bits, groups;  // m_tiles is 2^m_bits
    int cluster;                  // blocks
    int steps;                    // of `depth` components of an input capsule
    int slot_words;               // of the ring: 32-bit words for W and u of one input capsule
    int64_t tiles_b, tiles_j;
    int64_t splits;  // of the input capsules, each for a cluster: partial sums in memory
    int64_t length;  // input capsules of a group
    int64_t items;   // items of work; a cluster processes one at a time
    int64_t capsules_offset, progress_offset;  // bytes
    int64_t shared;                            // bytes of shared memory per block
};

constexpr int max_pass_warps = 8;  // per block: up to 255 registers per thread
constexpr int ring_slots = 3;      // two of which are copied while the third is used
constexpr int max_cluster = 8;
constexpr int progress_bytes = 48;  // of shared memory for each warp: where it is

// The most output capsules of a warp: as many of 8 n components as fit its registers; `few` leaves some.
constexpr int capsules_of_warp(int n, bool few) { return n == 1 ? 16 : n == 2 ? (few ? 8 : 10) : 5; }

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

// Plans the passes but for the division of the input capsules. Returns false if they do not support the shape
// on such a device.
bool plan_pass_tiles(const PassShape& shape, const FusedLimits& limits, PassTiling& to);

// Divides the input capsules. resident_clusters[n]: how many clusters of 2^n blocks the device runs at a
// time, 0 if none.
void divide_input_capsules(const PassShape& shape, const int (&resident_clusters)[4], PassTiling& to);

// Plan the passes over precomputed predictions, or the gradients. Return false if the fused kernels do not
// support the shape on such a device.
bool plan_precomputed_passes(const FusedShape& shape, const FusedLimits& limits, int resident_blocks,
                             Tiling& to);
bool plan_gradients(const FusedShape& shape, const FusedLimits& limits, Tiling& to);

// Also returns false if there are too few samples to keep the device busy.
bool plan_smem_cached(const FusedShape& shape, const FusedLimits& limits, SmemCachedTiling& to);

}  // namespace capsops
