// Where the time of a forward routing pass goes, and sketches of the two kinds of backward pass, for J = 10,
// D = 16, K = 8, I = 1152. Prints one JSON object a line.
//   nvcc -O3 -std=c++17 -arch=sm_90 benchmarks/gpu/sketches/backward_passes.cu -o backward_passes &&
//   ./backward_passes
//
// Forward and backward reduction: a warp holds 16 samples and all output capsules, or half of them (a pair of
// warps then shares a tile of samples and exchanges the softmax sums). Products are only with W_ij:
//   logit_ij = sum_k u_ik (sum_d V_jd W_ijdk)      V is the A operand (in registers), u multiplies the
//   result; a_ij     = sum_k u_ik (sum_d dS_jd W_ijdk)     backward only; out_jd  += sum_k (m_ij u_ik) W_ijdk
//   m = c forward, m = db = c (a - sum_j c a) backward.
// float32 forms u_hat once, from three TF32 products.
//
// Gradient pass, three iterations (float32: each product from three TF32 products): the couplings c_t and
// their gradients db_t come from the backward reductions, which save them. A warp holds two input capsules
// (16 rows: two capsules of eight k) and half of the output capsules, and goes through the samples; X is one
// of dS1 / J, dS2, V1, dS3, V2 with multiplier m = 1, c2, db2, c3, db3:
//   grad_u_bik    = sum_j sum_X m_bij (sum_d W_ijdk X_bjd)   W is the A operand, X the B operand;
//   grad_W_ijdk   = sum_b sum_X (m_bij u_bik) X_bjd          m u is the A operand, the samples are reduced.
#include <chrono>

#include "common.h"

// What a diagnosis changes in a pass. All have effect at run time only: the code is the same.
enum Flag { kNoStore = 1, kOneStage = 2, kNoBarrier = 4 };
struct Mode {
    int flags = 0;
    int limit = I;   // input capsules a block processes at most
    int repeat = 1;  // times it processes each
};
// kLoadV: 0, V is read by strided loads before the ring is filled; 1, after; 2, by coalesced copies to shared
// memory, before the ring is filled; 3, as 1, and the copies to the ring are unrolled. kPipe: the logits of
// an input capsule are formed among the sums of the one before it. kWarpsSm: the warps of a multiprocessor
// that registers must allow.
template <Variant kVariant, int kWarpCount, int kSplitCount, bool kBackwardPass, int kWarpsSm,
          int kStepCount = 2, int kStageCount = 4, int kLoad = 0, int kClusterSize = 1, bool kPipe = false>
struct Config {
    static constexpr Variant kV = kVariant;
    static constexpr bool kBackward = kBackwardPass, kPipelined = kPipe;
    static constexpr int kWarps = kWarpCount, kSplit = kSplitCount, kTiles = kWarps / kSplit, kJ = J / kSplit;
    static constexpr int kStep = kStepCount, kStages = kStageCount, kLoadV = kLoad, kCluster = kClusterSize;
    static constexpr int kMinBlocks = kWarpsSm > kWarps ? kWarpsSm / kWarps : 1;
    static constexpr int kVRow = J * D + 8;  // floats from a sample's V in shared memory to the next one's
    static constexpr int kRing = kStages * kStep * (kWBytes<kV> + kTiles * kUBytes<kV>);
    static constexpr int kAll = kRing + (kLoadV == 2 ? kTiles * 16 * kVRow * 4 : 0);
    static constexpr int kSums = kCluster > 1 ? kTiles * 16 * J * D * 4 : 0;
    static constexpr int kShared = kAll > kSums ? kAll : kSums;
};

// A barrier of two warps, of kPairs pairs. Constant numbers: a variable one would reserve all 16 barriers for
// each block.
template <int kPairs>
__device__ __forceinline__ void pair_barrier(int pair) {
    static_assert(kPairs <= 8, "");
    if constexpr (kPairs > 0)
        if (pair == 0) asm volatile("bar.sync 1, 64;" ::: "memory");
    if constexpr (kPairs > 1)
        if (pair == 1) asm volatile("bar.sync 2, 64;" ::: "memory");
    if constexpr (kPairs > 2)
        if (pair == 2) asm volatile("bar.sync 3, 64;" ::: "memory");
    if constexpr (kPairs > 3)
        if (pair == 3) asm volatile("bar.sync 4, 64;" ::: "memory");
    if constexpr (kPairs > 4)
        if (pair == 4) asm volatile("bar.sync 5, 64;" ::: "memory");
    if constexpr (kPairs > 5)
        if (pair == 5) asm volatile("bar.sync 6, 64;" ::: "memory");
    if constexpr (kPairs > 6)
        if (pair == 6) asm volatile("bar.sync 7, 64;" ::: "memory");
    if constexpr (kPairs > 7)
        if (pair == 7) asm volatile("bar.sync 8, 64;" ::: "memory");
}
__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// out = the sum, in the order of the blocks, of what each block of the cluster has in its shared memory.
template <int kCluster>
__device__ __forceinline__ void cluster_sum(float4* mine, float4* out, int n4) {
    auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (int n = cluster.block_rank() * blockDim.x + threadIdx.x; n < n4; n += kCluster * blockDim.x) {
        float4 x = make_float4(0, 0, 0, 0), p[kCluster];
#pragma unroll
        for (int r = 0; r < kCluster; ++r) p[r] = cluster.map_shared_rank(mine, r)[n];
#pragma unroll
        for (int r = 0; r < kCluster; ++r) x.x += p[r].x, x.y += p[r].y, x.z += p[r].z, x.w += p[r].w;
        out[n] = x;
    }
    cluster.sync();  // no block may end while another reads its shared memory
}
// X, the five arrays of the gradient pass, as blocks of 512 bytes a tile of samples, array, and output
// capsule. TF32: 8 samples of 64 bytes; sample b in row b ^ (b >> 2), chunk c of 16 bytes at c ^ (b & 2).
// bfloat16: 16 samples of 32 bytes, chunk c at c ^ (b >> 2 & 1). Both are read without bank conflicts as X
// and transposed.
constexpr int kArrays = 5;
struct Arrays {
    const float* x[kArrays];  // dS1, dS2, V1, dS3, V2
};
template <Variant kV>
__global__ void arrange_x(Arrays from, void* out, int batch) {
    constexpr int kRow = kV == kBf16 ? 16 : 8,
                  kChunks = kV == kBf16 ? 2 : 4;  // samples of a tile, chunks of a sample
    const int n = blockIdx.x * blockDim.x + threadIdx.x, chunk = n % kChunks, b = n / kChunks % kRow;
    const int block = n / kChunks / kRow, j = block % J, array = block / J % kArrays,
              tile = block / J / kArrays;
    if (tile >= batch / kRow) return;
    const float* x = from.x[array] + ((tile * kRow + b) * J + j) * D;
    const float f = array == 0 ? 1.f / J : 1.f;
    if constexpr (kV == kBf16) {
        x += chunk * 8;
        static_cast<uint4*>(out)[(block * 16 + b) * 2 + (chunk ^ (b >> 2 & 1))] =
            make_uint4(pack_bf16(f * x[0], f * x[1]), pack_bf16(f * x[2], f * x[3]),
                       pack_bf16(f * x[4], f * x[5]), pack_bf16(f * x[6], f * x[7]));
    } else {
        x += chunk * 4;
        store4<kV == kTf32 ? kTf32 : kFp32x3>(out, (block * 8 + (b ^ (b >> 2))) * 4 + (chunk ^ (b & 2)),
                                              f * x[0], f * x[1], f * x[2], f * x[3]);
    }
}

// Saved multipliers c and db of a pass: [I][B / 8][J][8 samples] of c and db. TF32 and float32: float2 a
// sample, samples in the order 0 4 1 5 2 6 3 7. bfloat16: c, c, db, db of two samples.
template <Variant kV>
constexpr int kSavedBytes = kV == kBf16 ? 4 : 8;  // of c and db
template <Variant kV>
__host__ __device__ constexpr int saved_at(int b, int which) {  // b < 8; which: c 0, db 1
    return kV == kBf16 ? (b >> 1) * 4 + which * 2 + (b & 1) : ((b & 3) * 2 + (b >> 2)) * 2 + which;
}
// c and db of output capsule j, input capsule i: rows g and g + 8 of a tile of 16 samples; lane t writes one.
template <Variant kV>
__device__ __forceinline__ void save(void* saved, int i, int tile, int batch, int j, const float (&c)[2],
                                     const float (&db)[2], int g, int t) {
    const float x = t & 2 ? (t & 1 ? db[1] : c[1]) : (t & 1 ? db[0] : c[0]);
    const size_t at =
        ((size_t)i * (batch / 8) + tile * 2 + (t >> 1)) * J * 16 + j * 16 + saved_at<kV>(g, t & 1);
    if constexpr (kV == kBf16)
        static_cast<unsigned short*>(saved)[at] = (unsigned short)pack_bf16(x, 0.f);
    else
        static_cast<float*>(saved)[at] = x;
}

// ---- what the passes share ----

// A ring of stages in shared memory, each with kStep input capsules: W first, then u of the block's samples.
template <class C>
struct Ring {
    static constexpr int kW = kWBytes<C::kV>, kU = C::kTiles * kUBytes<C::kV>, kBytes = C::kStep * (kW + kU);
    char* shared;
    const char *w, *u;
    size_t stride;  // bytes from an input capsule's u to the next one's
    int first, last, filled;

    __device__ __forceinline__ static void copy(char* to, const char* from, int bytes) {
#pragma unroll 1
        for (int n = threadIdx.x * 16; n < bytes; n += C::kWarps * 32 * 16) copy16(to + n, from + n);
    }
    template <int kCount>
    __device__ __forceinline__ static void copy_all(char* to, const char* from) {
        constexpr int kTurn = C::kWarps * 32 * 16;
        to += threadIdx.x * 16, from += threadIdx.x * 16;
#pragma unroll
        for (int n = 0; n < kCount; n += kTurn)
            if (n + kTurn <= kCount || (int)threadIdx.x * 16 + n < kCount) copy16(to + n, from + n);
    }
    __device__ __forceinline__ void load(int step) {
        const int i = first + step * C::kStep, n = min(C::kStep, last - i);
        char* to = shared + filled * kBytes;
        filled = filled + 1 == C::kStages ? 0 : filled + 1;
        if constexpr (C::kLoadV == 3)
            if (n == C::kStep) {
                copy_all<C::kStep * kW>(to, w + (size_t)i * kW);
#pragma unroll
                for (int k = 0; k < C::kStep; ++k)
                    copy_all<kU>(to + C::kStep * kW + k * kU, u + (i + k) * stride);
                copy_commit();
                return;
            }
        if (n > 0) copy(to, w + (size_t)i * kW, n * kW);
#pragma unroll 1
        for (int k = 0; k < n; ++k) copy(to + C::kStep * kW + k * kU, u + (i + k) * stride, kU);
        copy_commit();
    }
    __device__ __forceinline__ void start() {
#pragma unroll 1
        for (int step = 0; step < C::kStages - 1; ++step) load(step);
    }
    // Calls body(W of the input capsule, u of it, its number) for each input capsule of the block.
    template <class Body>
    __device__ __forceinline__ void run(const Mode& mode, Body body) {
        int used = 0;
#pragma unroll 1
        for (int step = 0; first + step * C::kStep < last; ++step) {
            copy_wait<C::kStages - 2>();
            if (!(mode.flags & kNoBarrier) || step == 0) __syncthreads();
            const char* stage = shared + used * kBytes;
            if (!(mode.flags & kOneStage)) {
                load(step + C::kStages - 1);
                used = used + 1 == C::kStages ? 0 : used + 1;
            }
            const int i = first + step * C::kStep, n = min(C::kStep, last - i);
#pragma unroll 1
            for (int k = 0; k < n; ++k)
#pragma unroll 1
                for (int r = 0; r < mode.repeat; ++r)
                    body(stage + k * kW, stage + C::kStep * kW + k * kU, i + k);
        }
    }
};
template <class C>
__device__ __forceinline__ Ring<C> make_ring(char* shared, const char* w, const char* u, int batch,
                                             const Mode& mode) {
    const int c = blockIdx.x, chunks = gridDim.x, first = I * c / chunks;
    return {shared,
            w,
            u + (size_t)blockIdx.y * C::kTiles * kUBytes<C::kV>,
            (size_t)batch / 16 * kUBytes<C::kV>,
            first,
            min(I * (c + 1) / chunks, first + mode.limit),
            0};
}
// ---- the passes ----

// The A operands of a product with W: x log2(e) or x, d = 2t, 2t + 1 and 8 more, rows g and g + 8.
template <Variant kV, int kA>
__device__ __forceinline__ void load_a(U (&a)[kA], const float* x, size_t row_stride, int t, float f) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const int row = n & 1, half = n >> 1;
        const float2 y = *reinterpret_cast<const float2*>(x + row * 8 * row_stride + 8 * half + 2 * t);
        if constexpr (kV == kBf16)
            a[n] = pack_bf16(y.x * f, y.y * f);
        else
            a[4 * half + row] = round_tf32(y.x * f), a[4 * half + 2 + row] = round_tf32(y.y * f);
    }
}
template <Variant kV, int kA>
__device__ __forceinline__ void multiply_w(float (&y)[4], const U (&a)[kA], const U (&b)[4]) {
    if constexpr (kV == kBf16) {
        mma_bf16_k16(y, a[0], a[1], a[2], a[3], b[0], b[1]);
    } else {
        mma_tf32(y, a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_tf32(y, a[4], a[5], a[6], a[7], b[2], b[3]);
    }
}

// Writes the sums of a warp: its tile of samples, its output capsules; with clusters, a sum for each cluster.
template <class C>
__device__ __forceinline__ void store_sums(const float (&s)[C::kJ][8], char* shared, float* parts, int batch,
                                           int own, int first_j, int g, int t, const Mode& mode) {
    if (mode.flags & kNoStore) return;
    float* out = parts + ((size_t)blockIdx.x * batch + (blockIdx.y * C::kTiles + own) * 16 + g) * J * D;
    if constexpr (C::kCluster > 1) {  // to shared memory first
        copy_wait<0>();
        __syncthreads();
        out = reinterpret_cast<float*>(shared) + (own * 16 + g) * J * D;
    }
#pragma unroll
    for (int j = 0; j < C::kJ; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* to = out + (8 * r * J + first_j + j) * D;
            const float* x = s[j] + 2 * r;
            if constexpr (C::kV == kBf16) {
                *reinterpret_cast<float2*>(to + 2 * t) = make_float2(x[0], x[1]);
                *reinterpret_cast<float2*>(to + 8 + 2 * t) = make_float2(x[4], x[5]);
            } else {
                *reinterpret_cast<float4*>(to + 4 * t) = make_float4(x[0], x[4], x[1], x[5]);
            }
        }
    if constexpr (C::kCluster > 1) {
        const size_t row = (size_t)(blockIdx.x / C::kCluster) * batch + blockIdx.y * C::kTiles * 16;
        cluster_sum<C::kCluster>(reinterpret_cast<float4*>(shared),
                                 reinterpret_cast<float4*>(parts + row * J * D), C::kTiles * 16 * J * D / 4);
    }
}

// Forward: parts = sums of c u_hat. Backward: parts = sums of db u_hat; saved, if not null, gets c and db.
template <class C>
__global__ void __launch_bounds__(C::kWarps * 32, C::kMinBlocks)
    pass_products(const char* __restrict__ w, const char* __restrict__ u, const float* __restrict__ V,
                  const float* __restrict__ dS, float* __restrict__ parts, void* __restrict__ saved,
                  int batch, Mode mode) {
    extern __shared__ __align__(128) char shared[];
    constexpr Variant kV = C::kV;
    constexpr int kA = kV == kBf16 ? 4 : 8, kJ = C::kJ, kB = C::kBackward ? kJ : 1;
    __shared__ float4 exchange[2][C::kTiles][2][16];  // two turns, pair of warps, warp, row
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int own = C::kSplit == 2 ? warp >> 1 : warp, half = C::kSplit == 2 ? warp & 1 : 0,
              first_j = half * kJ;
    const int tile = blockIdx.y * C::kTiles + own, sample = tile * 16 + g;
    const U even = bits(g & 1 ? 0.f : 1.f), odd = bits(g & 1 ? 1.f : 0.f);
    auto ring = make_ring<C>(shared, w, u, batch, mode);
    U a[kJ][kA], a2[kB][kA];
    float s[kJ][8] = {};
    if constexpr (C::kLoadV == 2) {
        float* to = reinterpret_cast<float*>(shared + C::kRing);
        const float* from = V + (size_t)blockIdx.y * C::kTiles * 16 * J * D;
#pragma unroll 4
        for (int n = threadIdx.x; n < C::kTiles * 16 * (J * D / 4); n += C::kWarps * 32) {
            const int row = n / (J * D / 4);
            copy16(to + n * 4 + row * (C::kVRow - J * D), from + n * 4);
        }
        copy_commit();
    }
    if constexpr (C::kLoadV > 0) ring.start();
    if constexpr (C::kLoadV == 2) {
        copy_wait<C::kStages - 1>();
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
        if constexpr (C::kLoadV == 2)
            load_a<kV>(a[j],
                       reinterpret_cast<const float*>(shared + C::kRing) + (own * 16 + g) * C::kVRow +
                           (first_j + j) * D,
                       C::kVRow, t, kLog2e);
        else
            load_a<kV>(a[j], V + (sample * J + first_j + j) * D, J * D, t, kLog2e);
        if constexpr (C::kBackward) load_a<kV>(a2[j], dS + (sample * J + first_j + j) * D, J * D, t, 1.f);
    }
    if constexpr (C::kLoadV == 0) ring.start();
    const int straight = first_j * 128 + g * 16 + (t ^ swap(g)) * 4;  // d = 2g, 2g + 1, k = 2t, 2t + 1
    const int transposed =
        first_j * 128 + t * 16 + ((g >> 1) ^ swap(t)) * 4 + (g & 1) * 2;  // d = 2t, 2t + 1, k = g
    int turn = 0;

    ring.run(mode, [&](const char* wi, const char* ui, int i) {
        float4 x;
        uint2 packed = {};
        if constexpr (kV == kBf16) {
            packed = reinterpret_cast<const uint2*>(ui)[own * 32 + lane];
            x = make_float4(__uint_as_float(packed.x << 16), __uint_as_float(packed.x & 0xffff0000u),
                            __uint_as_float(packed.y << 16), __uint_as_float(packed.y & 0xffff0000u));
        } else {
            x = reinterpret_cast<const float4*>(ui)[own * 32 + lane];
        }
        float e[2][kJ], q[2][kB], top[2], sum[2], dot[2] = {}, scale[2];
#pragma unroll
        for (int j = 0; j < kJ; j += 2) {
            U b[2][4] = {};
            if constexpr (kV == kBf16) {
                const int from = (j + 1 < kJ ? lane : lane & 15) * 16;  // an odd kJ reads its last one twice
                const uint4 r = ldmatrix<true>(shared_address(wi) + (first_j + j) * 256 + from);
                b[0][0] = r.x, b[0][1] = r.y, b[1][0] = r.z, b[1][1] = r.w;
            } else {
#pragma unroll
                for (int n = 0; n < 2; ++n)
                    if (j + n < kJ) {
                        const float* from = reinterpret_cast<const float*>(wi) + (j + n) * 128 + transposed;
                        const uint2 lo = *reinterpret_cast<const uint2*>(from);
                        const uint2 hi = *reinterpret_cast<const uint2*>(from + 64);
                        b[n][0] = lo.x, b[n][1] = lo.y, b[n][2] = hi.x, b[n][3] = hi.y;
                    }
            }
#pragma unroll
            for (int n = 0; n < 2; ++n)
                if (j + n < kJ) {
                    float y[4] = {};
                    multiply_w<kV>(y, a[j + n], b[n]);
                    e[0][j + n] = y[0] * x.x + y[1] * x.y;
                    e[1][j + n] = y[2] * x.z + y[3] * x.w;
                    if constexpr (C::kBackward) {
                        float z[4] = {};
                        multiply_w<kV>(z, a2[j + n], b[n]);
                        q[0][j + n] = z[0] * x.x + z[1] * x.y;
                        q[1][j + n] = z[2] * x.z + z[3] * x.w;
                    }
                }
        }
        quad_sum<false>(e, even, odd);
        if constexpr (C::kBackward) quad_sum<false>(q, even, odd);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            exponentials(e[r], top[r], sum[r]);
            if constexpr (C::kBackward)
#pragma unroll
                for (int j = 0; j < kJ; ++j) dot[r] += e[r][j] * q[r][j];
        }
        if constexpr (C::kSplit == 2) {
            float4(*slot)[16] = exchange[turn][own];
            if (t < 2)
                slot[half][g + 8 * t] =
                    t ? make_float4(top[1], sum[1], dot[1], 0) : make_float4(top[0], sum[0], dot[0], 0);
            pair_barrier<C::kTiles>(own);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float4 other = slot[half ^ 1][g + 8 * r];
                const float all = fmaxf(top[r], other.x), mine = exp2_fast(top[r] - all),
                            theirs = exp2_fast(other.x - all),
                            f = reciprocal(sum[r] * mine + other.y * theirs);
                scale[r] = mine * f;
                dot[r] = (dot[r] * mine + other.z * theirs) * f;
            }
            turn ^= 1;
        } else {
#pragma unroll
            for (int r = 0; r < 2; ++r) scale[r] = reciprocal(sum[r]), dot[r] *= scale[r];
        }
        if constexpr (C::kBackward) {
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                const float c[2] = {e[0][j] * scale[0], e[1][j] * scale[1]};
                e[0][j] = c[0] * (q[0][j] - dot[0]), e[1][j] = c[1] * (q[1][j] - dot[1]);
                if (saved) {
                    const float db[2] = {e[0][j], e[1][j]};
                    save<kV>(saved, i, tile, batch, first_j + j, c, db, g, t);
                }
            }
        } else {
            x.x *= scale[0], x.y *= scale[0], x.z *= scale[1], x.w *= scale[1];
        }
        if constexpr (kV == kBf16) {
            const U x0 = pack_bf16(x.x, x.y), x1 = pack_bf16(x.z, x.w);
#pragma unroll
            for (int j = 0; j < kJ; j += 2) {
                const int from = (j + 1 < kJ ? lane : lane & 15) * 16;
                const uint4 b = ldmatrix<false>(shared_address(wi) + (first_j + j) * 256 + from);
#pragma unroll
                for (int n = 0; n < 2; ++n)
                    if (j + n < kJ) {
                        const U c0 = multiply_bf16(pack_bf16(e[0][j + n], e[0][j + n]), x0);
                        const U c1 = multiply_bf16(pack_bf16(e[1][j + n], e[1][j + n]), x1);
                        mma_bf16_k8(s[j + n], c0, c1, n ? b.z : b.x);
                        mma_bf16_k8(s[j + n] + 4, c0, c1, n ? b.w : b.y);
                    }
            }
        } else {
            // mma drops the low bits of its A operand: on average 0.72 / 2^11 of it, added back here.
            x.x *= 1.000352f, x.y *= 1.000352f, x.z *= 1.000352f, x.w *= 1.000352f;
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                const uint4 b = *reinterpret_cast<const uint4*>(wi + (j * 128 + straight) * 4);
                const U c[4] = {bits(e[0][j] * x.x), bits(e[1][j] * x.z), bits(e[0][j] * x.y),
                                bits(e[1][j] * x.w)};
                mma_tf32(s[j], c[0], c[1], c[2], c[3], b.x, b.z);
                mma_tf32(s[j] + 4, c[0], c[1], c[2], c[3], b.y, b.w);
            }
        }
    });
    store_sums<C>(s, shared, parts, batch, own, first_j, g, t, mode);
}

// The forward pass, no split: the products that form the logits of an input capsule are issued between those
// that add the one before it, so that they do not wait for each other. The copies cost few instructions.
template <class C>
__global__ void __launch_bounds__(C::kWarps * 32, C::kMinBlocks)
    pass_pipelined(const char* __restrict__ w, const char* __restrict__ u, const float* __restrict__ V,
                   const float*, float* __restrict__ parts, void*, int batch, Mode mode) {
    extern __shared__ __align__(128) char shared[];
    constexpr Variant kV = C::kV;
    constexpr int kA = kV == kBf16 ? 4 : 8, kW = kWBytes<kV>, kU = C::kTiles * kUBytes<kV>, kBytes = kW + kU;
    constexpr int kThreads = C::kWarps * 32;
    static_assert(C::kStep == 1 && C::kStages >= 3 && C::kSplit == 1 && !C::kBackward, "");
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int tile = blockIdx.y * C::kTiles + warp, sample = tile * 16 + g;
    const U even = bits(g & 1 ? 0.f : 1.f), odd = bits(g & 1 ? 1.f : 0.f);
    const int first = I * blockIdx.x / gridDim.x;
    const int last = min(I * ((int)blockIdx.x + 1) / (int)gridDim.x, first + mode.limit);
    const unsigned stride = batch / 16 * kUBytes<kV>;
    unsigned at_w = first * kW + threadIdx.x * 16, at_u = blockIdx.y * kU + first * stride + threadIdx.x * 16;
    auto load = [&](int i, int stage) {
        if (i < last) {
            char* to = shared + stage * kBytes + threadIdx.x * 16;
#pragma unroll
            for (int n = 0; n < kW; n += kThreads * 16)
                if (n + kThreads * 16 <= kW || (int)threadIdx.x * 16 + n < kW) copy16(to + n, w + at_w + n);
#pragma unroll
            for (int n = 0; n < kU; n += kThreads * 16)
                if (n + kThreads * 16 <= kU || (int)threadIdx.x * 16 + n < kU)
                    copy16(to + kW + n, u + at_u + n);
            at_w += kW, at_u += stride;
        }
        copy_commit();
    };
#pragma unroll 1
    for (int n = 0; n < C::kStages - 1; ++n) load(first + n, n);
    U a[J][kA];
    float s[J][8] = {};
#pragma unroll
    for (int j = 0; j < J; ++j) load_a<kV>(a[j], V + (sample * J + j) * D, J * D, t, kLog2e);
    const int straight = (g * 16 + (t ^ swap(g)) * 4) * 4;
    const int transposed = (t * 16 + ((g >> 1) ^ swap(t)) * 4 + (g & 1) * 2) * 4;

    auto load_x = [&](const char* stage) {
        if constexpr (kV == kBf16) {
            const uint2 p = reinterpret_cast<const uint2*>(stage + kW)[warp * 32 + lane];
            return make_float4(__uint_as_float(p.x << 16), __uint_as_float(p.x & 0xffff0000u),
                               __uint_as_float(p.y << 16), __uint_as_float(p.y & 0xffff0000u));
        } else {
            return reinterpret_cast<const float4*>(stage + kW)[warp * 32 + lane];
        }
    };
    auto front = [&](const char* stage, int j, const float4& x, float (&e)[2][J]) {  // j and j + 1
        U b[2][4] = {};
        if constexpr (kV == kBf16) {
            const uint4 r = ldmatrix<true>(shared_address(stage) + j * 256 + lane * 16);
            b[0][0] = r.x, b[0][1] = r.y, b[1][0] = r.z, b[1][1] = r.w;
        } else {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const uint2 lo = *reinterpret_cast<const uint2*>(stage + (j + n) * 512 + transposed);
                const uint2 hi = *reinterpret_cast<const uint2*>(stage + (j + n) * 512 + transposed + 256);
                b[n][0] = lo.x, b[n][1] = lo.y, b[n][2] = hi.x, b[n][3] = hi.y;
            }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float y[4] = {};
            multiply_w<kV>(y, a[j + n], b[n]);
            e[0][j + n] = y[0] * x.x + y[1] * x.y;
            e[1][j + n] = y[2] * x.z + y[3] * x.w;
        }
    };
    // Softmax; x becomes u / sum.
    auto middle = [&](float (&e)[2][J], float4& x) {
        float top, sum[2];
        quad_sum<false>(e, even, odd);
        exponentials(e[0], top, sum[0]);
        exponentials(e[1], top, sum[1]);
        const float f = kV == kBf16 ? 1.f : 1.000352f, r0 = reciprocal(sum[0]) * f,
                    r1 = reciprocal(sum[1]) * f;
        x.x *= r0, x.y *= r0, x.z *= r1, x.w *= r1;
    };
    auto back = [&](const char* stage, int j, const float4& x, const float (&e)[2][J]) {
        if constexpr (kV == kBf16) {
            const U x0 = pack_bf16(x.x, x.y), x1 = pack_bf16(x.z, x.w);
            const uint4 b = ldmatrix<false>(shared_address(stage) + j * 256 + lane * 16);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const U c0 = multiply_bf16(pack_bf16(e[0][j + n], e[0][j + n]), x0);
                const U c1 = multiply_bf16(pack_bf16(e[1][j + n], e[1][j + n]), x1);
                mma_bf16_k8(s[j + n], c0, c1, n ? b.z : b.x);
                mma_bf16_k8(s[j + n] + 4, c0, c1, n ? b.w : b.y);
            }
        } else {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const uint4 b = *reinterpret_cast<const uint4*>(stage + (j + n) * 512 + straight);
                const U c[4] = {bits(e[0][j + n] * x.x), bits(e[1][j + n] * x.z), bits(e[0][j + n] * x.y),
                                bits(e[1][j + n] * x.w)};
                mma_tf32(s[j + n], c[0], c[1], c[2], c[3], b.x, b.z);
                mma_tf32(s[j + n] + 4, c[0], c[1], c[2], c[3], b.y, b.w);
            }
        }
    };
    if (first < last) {
        float e[2][J];
        copy_wait<C::kStages - 2>();
        __syncthreads();
        const char* stage = shared;
        int used = 0;
        float4 x = load_x(stage);
#pragma unroll
        for (int j = 0; j < J; j += 2) front(stage, j, x, e);
        middle(e, x);
#pragma unroll 1
        for (int i = first; i + 1 < last; ++i) {
            copy_wait<C::kStages - 3>();
            __syncthreads();
            load(i + C::kStages - 1,
                 used == 0 ? C::kStages - 1 : used - 1);  // the stage of input capsule i - 1
            used = used + 1 == C::kStages ? 0 : used + 1;
            const char* next = shared + used * kBytes;
            const float4 next_x = load_x(next);
            float next_e[2][J];
#pragma unroll
            for (int j = 0; j < J; j += 2) front(next, j, next_x, next_e), back(stage, j, x, e);
            stage = next, x = next_x;
#pragma unroll
            for (int j = 0; j < J; ++j) e[0][j] = next_e[0][j], e[1][j] = next_e[1][j];
            middle(e, x);
        }
#pragma unroll
        for (int j = 0; j < J; j += 2) back(stage, j, x, e);
    }
    store_sums<C>(s, shared, parts, batch, warp, 0, g, t, mode);
}

// The backward reduction in float32; two warps share the output capsules.
template <class C>
__global__ void __launch_bounds__(C::kWarps * 32, C::kMinBlocks)
    reduce_fp32x3(const char* __restrict__ w, const char* __restrict__ u, const float* __restrict__ V,
                  const float* __restrict__ dS, float* __restrict__ parts, void* __restrict__ saved,
                  int batch, Mode mode) {
    extern __shared__ __align__(128) char shared[];
    __shared__ float4 exchange[2][C::kTiles][2][16];  // two turns, pair of warps, warp, row
    constexpr int kJ = J / 2;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, pair = threadIdx.x >> 6,
              half = threadIdx.x >> 5 & 1;
    const int tile = blockIdx.y * C::kTiles + pair, sample = tile * 16 + g, first_j = half * kJ;
    const U even = bits(g & 1 ? 0.f : 1.f), odd = bits(g & 1 ? 1.f : 0.f);
    auto ring = make_ring<C>(shared, w, u, batch, mode);
    float v[kJ][2][4], ds[kJ][2][4], s[kJ][8] = {};  // d = 4t ... 4t + 3; s in the order of the accumulators
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int from = ((sample + 8 * r) * J + first_j + j) * D + 4 * t;
            const float4 x = *reinterpret_cast<const float4*>(V + from);
            const float4 y = *reinterpret_cast<const float4*>(dS + from);
            v[j][r][0] = x.x * kLog2e, v[j][r][1] = x.y * kLog2e;
            v[j][r][2] = x.z * kLog2e, v[j][r][3] = x.w * kLog2e;
            ds[j][r][0] = y.x, ds[j][r][1] = y.y, ds[j][r][2] = y.z, ds[j][r][3] = y.w;
        }
    ring.start();
    const int straight = first_j * 128 + g * 16 + (t ^ swap(g)) * 4;
    int turn = 0;

    ring.run(mode, [&](const char* wi, const char* ui, int i) {
        const float4 x = reinterpret_cast<const float4*>(ui)[pair * 32 + lane];
        const float a[4] = {x.x, x.y, x.z, x.w};
        U ah[4], al[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) ah[n] = bits(high_part(a[n])), al[n] = bits(a[n] - high_part(a[n]));
        float y[kJ][8] = {}, e[2][kJ], q[2][kJ], top[2], sum[2], dot[2] = {}, scale[2];
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            const float4 f = *reinterpret_cast<const float4*>(wi + (j * 128 + straight) * 4);
            const float b[4] = {f.x, f.y, f.z, f.w};
            U bh[4], bl[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) bh[n] = bits(high_part(b[n])), bl[n] = bits(b[n] - high_part(b[n]));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                mma_tf32(y[j] + 4 * n, al[0], al[1], al[2], al[3], bh[2 * n], bh[2 * n + 1]);
                mma_tf32(y[j] + 4 * n, ah[0], ah[1], ah[2], ah[3], bl[2 * n], bl[2 * n + 1]);
                mma_tf32(y[j] + 4 * n, ah[0], ah[1], ah[2], ah[3], bh[2 * n], bh[2 * n + 1]);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float h[4] = {y[j][2 * r], y[j][4 + 2 * r], y[j][2 * r + 1], y[j][5 + 2 * r]};
                e[r][j] = h[0] * v[j][r][0] + h[1] * v[j][r][1] + h[2] * v[j][r][2] + h[3] * v[j][r][3];
                q[r][j] = h[0] * ds[j][r][0] + h[1] * ds[j][r][1] + h[2] * ds[j][r][2] + h[3] * ds[j][r][3];
            }
        }
        quad_sum<true>(e, even, odd);
        quad_sum<true>(q, even, odd);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            exponentials(e[r], top[r], sum[r]);
#pragma unroll
            for (int j = 0; j < kJ; ++j) dot[r] += e[r][j] * q[r][j];
        }
        float4(*slot)[16] = exchange[turn][pair];
        if (t < 2)
            slot[half][g + 8 * t] =
                t ? make_float4(top[1], sum[1], dot[1], 0) : make_float4(top[0], sum[0], dot[0], 0);
        pair_barrier<C::kTiles>(pair);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float4 other = slot[half ^ 1][g + 8 * r];
            const float all = fmaxf(top[r], other.x), mine = exp2_fast(top[r] - all),
                        theirs = exp2_fast(other.x - all), f = reciprocal(sum[r] * mine + other.y * theirs);
            scale[r] = mine * f;
            dot[r] = (dot[r] * mine + other.z * theirs) * f;
        }
        turn ^= 1;
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            const float c[2] = {e[0][j] * scale[0], e[1][j] * scale[1]};
            const float db[2] = {c[0] * (q[0][j] - dot[0]), c[1] * (q[1][j] - dot[1])};
            if (saved) save<kFp32x3>(saved, i, tile, batch, first_j + j, c, db, g, t);
#pragma unroll
            for (int n = 0; n < 8; ++n) s[j][n] += db[n >> 1 & 1] * y[j][n];
        }
    });
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* to = parts + (((size_t)blockIdx.x * batch + sample + 8 * r) * J + first_j + j) * D + 4 * t;
            const float* x = s[j] + 2 * r;
            *reinterpret_cast<float4*>(to) = make_float4(x[0], x[4], x[1], x[5]);
        }
}

// c += a b, in TF32 or from three TF32 products.
template <bool kExact>
__device__ __forceinline__ void multiply(float* c, const float (&a)[4], float b0, float b1) {
    if constexpr (kExact) {
        U ah[4], al[4];
        for (int n = 0; n < 4; ++n) ah[n] = bits(high_part(a[n])), al[n] = bits(a[n] - high_part(a[n]));
        const float h0 = high_part(b0), h1 = high_part(b1);
        mma_tf32(c, al[0], al[1], al[2], al[3], bits(h0), bits(h1));
        mma_tf32(c, ah[0], ah[1], ah[2], ah[3], bits(b0 - h0), bits(b1 - h1));
        mma_tf32(c, ah[0], ah[1], ah[2], ah[3], bits(h0), bits(h1));
    } else {
        mma_tf32(c, bits(a[0]), bits(a[1]), bits(a[2]), bits(a[3]), bits(b0), bits(b1));
    }
}

// The gradient pass. A block has kPairs pairs of input capsules, a pair of warps each (half of the output
// capsules), and the tiles of samples of one part of the batch.
template <Variant kV, int kPairs, int kStages>
constexpr int kGradientShared = kStages * (kArrays * J * 512 + kPairs * 2560);
template <Variant kV, int kPairs, int kStages, int kMinBlocks>
__global__ void __launch_bounds__(kPairs * 64, kMinBlocks)
    gradient(const float* __restrict__ w, const float* __restrict__ u, const char* __restrict__ x,
             const char* __restrict__ saved, float* __restrict__ grad_u, float* __restrict__ grad_w,
             int batch) {
    extern __shared__ __align__(128) char shared[];
    constexpr bool kExact = kV == kFp32x3;
    constexpr int kJ = J / 2, kRow = kV == kBf16 ? 16 : 8, kN = kRow / 8;  // kN: tiles of 8 samples
    constexpr int kX = kArrays * J * 512, kBytes = kX + kPairs * 2560, kA = kV == kBf16 ? 4 : 8;
    __shared__ float exchange[2][kPairs][2][2 * kN][32];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, pair = threadIdx.x >> 6,
              half = threadIdx.x >> 5 & 1, first_j = half * kJ;
    const bool valid = blockIdx.x * kPairs + pair < I / 2;
    const int i0 = 2 * min((int)blockIdx.x * kPairs + pair, I / 2 - 1);
    const int tiles = batch / kRow, first = tiles * blockIdx.y / gridDim.y,
              last = tiles * (blockIdx.y + 1) / gridDim.y;

    // Where a thread of the pair reads its three pieces (of 160) of the saved multipliers.
    unsigned piece[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        const int n = (threadIdx.x & 63) + 64 * k, which = n / 40;  // iteration and input capsule
        piece[k] = (unsigned)((which >> 1) * I + i0 + (which & 1)) * (tiles * 640) + (n - which * 40) * 16;
    }
    auto load = [&](int tile, int stage) {
        if (tile < last) {
            char* to = shared + stage * kBytes + threadIdx.x * 16;
            const char* from = x + (size_t)tile * kX + threadIdx.x * 16;
#pragma unroll
            for (int n = 0; n < kX; n += kPairs * 64 * 16)
                if (n + kPairs * 64 * 16 <= kX || (int)threadIdx.x * 16 + n < kX) copy16(to + n, from + n);
            to = shared + stage * kBytes + kX + pair * 2560 + (threadIdx.x & 63) * 16;
            from = saved + tile * 640;
#pragma unroll
            for (int k = 0; k < 3; ++k)
                if (k < 2 || half == 0) copy16(to + k * 1024, from + piece[k]);
        }
        copy_commit();
    };
    // u of k = g: [capsule][sample of the lane], samples t, t + 4 (TF32) or 2t, 2t + 1, 2t + 8, 2t + 9.
    auto sample_at = [&](int n) { return kV == kBf16 ? 2 * t + (n & 1) + 8 * (n >> 1) : t + 4 * n; };
    float next[2][2 * kN];
    auto load_u = [&](int tile) {
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int n = 0; n < 2 * kN; ++n)
                next[c][n] = u[((tile * kRow + sample_at(n)) * I + i0 + c) * K + g];
    };
#pragma unroll 1
    for (int n = 0; n < kStages - 1; ++n) load(first + n, n);
    load_u(first);
    U a[kJ][kA];  // W: rows of two capsules and eight k, reduced over d
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
        auto at = [&](int c, int d) { return w[((size_t)((i0 + c) * J + first_j + j) * D + d) * K + g]; };
        if constexpr (kV == kBf16) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int d = 2 * t + 8 * (n >> 1);
                a[j][n] = pack_bf16(at(n & 1, d), at(n & 1, d + 1));
            }
        } else {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float y = at(n & 1, 4 * t + (n >> 1));
                a[j][n] = kExact ? bits(y) : round_tf32(y);
            }
        }
    }
    float acc[kJ][2][4] = {};
    // Places of a lane in a block of 512 bytes.
    const int column = (g >> 1) + 4 * (g & 1);  // TF32: the sample of column g
    const int at_x = kV == kBf16
                         ? ((lane >> 4) * 8 + (lane & 7)) * 32 + ((lane >> 3 & 1) ^ (lane >> 2 & 1)) * 16
                         : (column ^ (column >> 2)) * 64 + (t ^ (column & 2)) * 16;
    // bfloat16: matrices (samples, d) 0 0, 0 8, 8 0, 8 8 as X; 0 0, 8 0, 0 8, 8 8 transposed.
    const int at_lo = kV == kBf16
                          ? ((lane >> 3 & 1) * 8 + (lane & 7)) * 32 + ((lane >> 4) ^ (lane >> 2 & 1)) * 16
                          : t * 64 + ((g >> 1) ^ (t & 2)) * 16 + (g & 1) * 8;
    const int at_hi = at_lo ^ 5 * 64;  // row (t + 4) ^ 1
    int used = 0;

#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
        copy_wait<kStages - 2>();
        __syncthreads();
        load(tile + kStages - 1, used == 0 ? kStages - 1 : used - 1);
        const char* stage = shared + used * kBytes;
        used = used + 1 == kStages ? 0 : used + 1;
        const char* multipliers = stage + kX + pair * 2560;
        float out[kN][4] = {};  // grad_u of this half: k = g; two samples of the first capsule, of the second
        if constexpr (kV == kBf16) {
            U uu[2][2];  // [capsule][tile of 8 samples]
#pragma unroll
            for (int c = 0; c < 2; ++c)
#pragma unroll
                for (int n = 0; n < 2; ++n) uu[c][n] = pack_bf16(next[c][2 * n], next[c][2 * n + 1]);
            load_u(min(tile + 1, last - 1));
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                uint2 m[2][2][2];  // c and db: [iteration][capsule][tile of 8 samples]
#pragma unroll
                for (int n = 0; n < 8; ++n)
                    m[n >> 2][n >> 1 & 1][n & 1] = *reinterpret_cast<const uint2*>(
                        multipliers + (n >> 1) * 640 + (n & 1) * 320 + (first_j + j) * 32 + t * 8);
#pragma unroll
                for (int array = 0; array < kArrays; ++array) {
                    const U from = shared_address(stage) + (array * J + first_j + j) * 512;
                    const uint4 b = ldmatrix<false>(from + at_x), bt = ldmatrix<true>(from + at_lo);
                    U p[2][2];
                    if (array == 0) {
                        mma_bf16_k16(out[0], a[j][0], a[j][1], a[j][2], a[j][3], b.x, b.y);
                        mma_bf16_k16(out[1], a[j][0], a[j][1], a[j][2], a[j][3], b.z, b.w);
#pragma unroll
                        for (int n = 0; n < 4; ++n) p[n >> 1][n & 1] = uu[n >> 1][n & 1];
                    } else {
                        float y[2][4] = {};
                        mma_bf16_k16(y[0], a[j][0], a[j][1], a[j][2], a[j][3], b.x, b.y);
                        mma_bf16_k16(y[1], a[j][0], a[j][1], a[j][2], a[j][3], b.z, b.w);
#pragma unroll
                        for (int n = 0; n < 4; ++n) {
                            const int c = n >> 1, h = n & 1;
                            const uint2 both = m[(array - 1) >> 1][c][h];
                            const U mine = array & 1 ? both.x : both.y;
                            p[c][h] = multiply_bf16(mine, uu[c][h]);
                            out[h][2 * c] += __uint_as_float(mine << 16) * y[h][2 * c];
                            out[h][2 * c + 1] += __uint_as_float(mine & 0xffff0000u) * y[h][2 * c + 1];
                        }
                    }
                    mma_bf16_k16(acc[j][0], p[0][0], p[1][0], p[0][1], p[1][1], bt.x, bt.y);
                    mma_bf16_k16(acc[j][1], p[0][0], p[1][0], p[0][1], p[1][1], bt.z, bt.w);
                }
            }
        } else {
            float uu[4];  // capsule 0: samples t, t + 4; capsule 1; the low bits that mma drops given back
#pragma unroll
            for (int n = 0; n < 4; ++n) uu[n] = next[n >> 1][n & 1] * (kExact ? 1.f : 1.000352f);
            load_u(min(tile + 1, last - 1));
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                float a0[4], a1[4];
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    a0[n] = __uint_as_float(a[j][n]), a1[n] = __uint_as_float(a[j][4 + n]);
                float4 m[2][2];  // c, db of sample t; c, db of t + 4: [iteration][capsule]
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    m[n >> 1][n & 1] =
                        *reinterpret_cast<const float4*>(multipliers + n * 640 + (first_j + j) * 64 + t * 16);
#pragma unroll
                for (int array = 0; array < kArrays; ++array) {
                    const char* from = stage + (array * J + first_j + j) * 512;
                    const float4 b = *reinterpret_cast<const float4*>(from + at_x);
                    const float2 lo = *reinterpret_cast<const float2*>(from + at_lo);
                    const float2 hi = *reinterpret_cast<const float2*>(from + at_hi);
                    float p[4];
                    if (array == 0) {
                        multiply<kExact>(out[0], a0, b.x, b.y);
                        multiply<kExact>(out[0], a1, b.z, b.w);
#pragma unroll
                        for (int n = 0; n < 4; ++n) p[n] = uu[n];
                    } else {
                        float y[4] = {};
                        multiply<kExact>(y, a0, b.x, b.y);
                        multiply<kExact>(y, a1, b.z, b.w);
#pragma unroll
                        for (int n = 0; n < 4; ++n) {
                            const float4 both = m[(array - 1) >> 1][n >> 1];
                            const float mine =
                                array & 1 ? (n & 1 ? both.z : both.x) : (n & 1 ? both.w : both.y);
                            p[n] = mine * uu[n];
                            out[0][n] += mine * y[n];
                        }
                    }
                    const float m_u[4] = {p[0], p[2], p[1], p[3]};
                    multiply<kExact>(acc[j][0], m_u, lo.x, hi.x);
                    multiply<kExact>(acc[j][1], m_u, lo.y, hi.y);
                }
            }
        }
        // The two warps exchange their halves: each finishes one capsule.
        const int turn = tile & 1;
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n)
            exchange[turn][pair][half][n][lane] = half ? out[n >> 1][n & 1] : out[n >> 1][2 + (n & 1)];
        pair_barrier<kPairs>(pair);
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n) {
            const float mine = half ? out[n >> 1][2 + (n & 1)] : out[n >> 1][n & 1];
            if (valid)
                grad_u[((tile * kRow + sample_at(n)) * I + i0 + half) * K + g] =
                    mine + exchange[turn][pair][half ^ 1][n][lane];
        }
    }
    if (!valid) return;
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const int h = n >> 2, c = n >> 1 & 1, e = n & 1,
                      d = kV == kBf16 ? 8 * h + 2 * t + e : 4 * t + 2 * e + h;
            grad_w[((((size_t)blockIdx.y * I + i0 + c) * J + first_j + j) * D + d) * K + g] =
                acc[j][h][2 * c + e];
        }
}

__global__ void sum_weight(const float4* __restrict__ parts, float4* out, int numbers, int count) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= numbers) return;
    float4 x = parts[n];
    for (int c = 1; c < count; ++c) {
        const float4 p = parts[(size_t)c * numbers + n];
        x.x += p.x, x.y += p.y, x.z += p.z, x.w += p.w;
    }
    out[n] = x;
}

// ---- host ----

const auto begin = std::chrono::steady_clock::now();
// As attempt, if it is not too late.
template <class F>
void attempt_in_time(const std::string& label, F f) {
    attempt(label, [&] {
        if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(30))  // leave time to end
            throw std::runtime_error("no time left");
        f();
    });
}

// Arrays of the gradient pass, by place in Arrays.
enum { kDS1, kDS2, kV1, kDS3, kV2 };

struct Problem {
    int batch, launches;                                           // launches in a graph
    std::vector<int> samples, capsules;                            // those compared with the reference
    std::vector<double> forward, backward;                         // s and dV of the samples, with V2 and dS3
    std::vector<double> c, db;                                     // [capsule][batch][J], with V2 and dS3
    std::vector<double> grad_u, grad_w;                            // [capsule][batch][K], [capsule][J][D][K]
    float *u, *w, *x[kArrays], *parts, *s, *v, *du, *dw, *dw_sum;  // on the device
    char *arranged_u, *arranged_w, *arranged_x, *saved[2];         // saved: iterations 2 and 3
    size_t parts_floats, saved_bytes;
    static constexpr int kWeightParts = 8;

    explicit Problem(int batch) : batch(batch), launches(batch == 128 ? 20 : 6) {
        std::mt19937 random(batch);
        std::normal_distribution<float> normal;
        std::vector<float> hu((size_t)batch * I * K), hw((size_t)I * J * D * K), hx[kArrays];
        for (float& y : hu) y = 0.3f * normal(random);
        for (float& y : hw) y = 0.1f * normal(random);
        for (int n = 0; n < kArrays; ++n) {
            hx[n].resize((size_t)batch * J * D);
            for (float& y : hx[n]) y = (n == kV1 || n == kV2 ? 0.7f : 0.1f) * normal(random);
            x[n] = upload(hx[n]);
        }
        u = upload(hu), w = upload(hw);
        parts_floats = (size_t)4 * processors * 8 * 16 * J * D;
        parts = allocate<float>(parts_floats);
        s = allocate<float>(hx[0].size()), v = allocate<float>(hx[0].size());
        du = allocate<float>(hu.size()), dw = allocate<float>(hw.size() * kWeightParts);
        dw_sum = allocate<float>(hw.size());
        arranged_u = allocate<char>(hu.size() * 4), arranged_w = allocate<char>(hw.size() * 4);
        arranged_x = allocate<char>(hx[0].size() * 4 * kArrays);
        saved_bytes = (size_t)I * batch * J * 8;
        saved[0] = allocate<char>(2 * saved_bytes);
        use_saved(kTf32);
        check(cudaDeviceSynchronize());
        reference(hu, hw, hx);
    }
    ~Problem() {
        for (void* p : {(void*)u, (void*)w, (void*)x[0], (void*)x[1], (void*)x[2], (void*)x[3], (void*)x[4],
                        (void*)parts, (void*)s, (void*)v, (void*)du, (void*)dw, (void*)dw_sum,
                        (void*)arranged_u, (void*)arranged_w, (void*)arranged_x, (void*)saved[0]})
            cudaFree(p);
    }
    // The multipliers of iteration 3 follow those of iteration 2.
    void use_saved(Variant v) { saved[1] = saved[0] + (size_t)I * batch * J * (v == kBf16 ? 4 : 8); }
    static float* upload(const std::vector<float>& x) {
        float* p = allocate<float>(x.size());
        check(cudaMemcpy(p, x.data(), x.size() * sizeof(float), cudaMemcpyHostToDevice));
        return p;
    }
    // u_hat, c, and db of a sample and an input capsule.
    static void couplings(const float* w, const double* y, const float* V, const float* dS, double* c,
                          double* db) {
        double top = -1e300, sum = 0, a[J], mean = 0;
        for (int j = 0; j < J; ++j) {
            c[j] = a[j] = 0;
            for (int d = 0; d < D; ++d)
                c[j] += y[j * D + d] * V[j * D + d], a[j] += y[j * D + d] * dS[j * D + d];
            top = std::max(top, c[j]);
        }
        for (int j = 0; j < J; ++j) sum += c[j] = std::exp(c[j] - top);
        for (int j = 0; j < J; ++j) c[j] /= sum, mean += c[j] * a[j];
        for (int j = 0; j < J; ++j) db[j] = c[j] * (a[j] - mean);
    }
    static void project(const float* w, const float* u, double* y) {
        for (int m = 0; m < J * D; ++m) {
            double x = 0;
            for (int k = 0; k < K; ++k) x += (double)w[m * K + k] * u[k];
            y[m] = x;
        }
    }
    void reference(const std::vector<float>& hu, const std::vector<float>& hw,
                   const std::vector<float> (&hx)[kArrays]) {
        const int stride = batch / 128;
        double y[J * D], c2[J], db2[J], c3[J], db3[J];
        for (int n = 0; n < 128; ++n) samples.push_back(n * stride + n / 2 % stride);
        for (int n = 0; n < 128; ++n) capsules.push_back(n * (I / 128) + n % (I / 128));
        forward.assign(samples.size() * J * D, 0.), backward = forward;
        for (size_t n = 0; n < samples.size(); ++n)
            for (int i = 0; i < I; ++i) {
                const float* wi = &hw[(size_t)i * J * D * K];
                const size_t at = (size_t)samples[n] * J * D;
                project(wi, &hu[((size_t)samples[n] * I + i) * K], y);
                couplings(wi, y, &hx[kV2][at], &hx[kDS3][at], c3, db3);
                for (int m = 0; m < J * D; ++m)
                    forward[n * J * D + m] += c3[m / D] * y[m], backward[n * J * D + m] += db3[m / D] * y[m];
            }
        c.assign(capsules.size() * batch * J, 0.), db = c;
        grad_u.assign(capsules.size() * batch * K, 0.), grad_w.assign(capsules.size() * J * D * K, 0.);
        for (size_t n = 0; n < capsules.size(); ++n)
            for (int b = 0; b < batch; ++b) {
                const float *wi = &hw[(size_t)capsules[n] * J * D * K],
                            *ub = &hu[((size_t)b * I + capsules[n]) * K];
                const size_t at = (size_t)b * J * D;
                project(wi, ub, y);
                couplings(wi, y, &hx[kV1][at], &hx[kDS2][at], c2, db2);
                couplings(wi, y, &hx[kV2][at], &hx[kDS3][at], c3, db3);
                for (int j = 0; j < J; ++j)
                    c[(n * batch + b) * J + j] = c3[j], db[(n * batch + b) * J + j] = db3[j];
                double *gu = &grad_u[(n * batch + b) * K], *gw = &grad_w[n * J * D * K];
                for (int m = 0; m < J * D; ++m) {
                    const int j = m / D;
                    const double g = hx[kDS1][at + m] / (double)J + c2[j] * hx[kDS2][at + m] +
                                     db2[j] * hx[kV1][at + m] + c3[j] * hx[kDS3][at + m] +
                                     db3[j] * hx[kV2][at + m];
                    for (int k = 0; k < K; ++k) gu[k] += g * wi[m * K + k], gw[m * K + k] += g * ub[k];
                }
            }
    }
    void launch_sum(int chunks) const {
        const int numbers = batch * J * D / 4;
        sum_parts<<<numbers / 32, 256, 0, stream>>>((float4*)parts, (float4*)s, (float4*)v, numbers, chunks);
    }
    void launch_sum_weight(int count) const {
        const int numbers = I * J * D * K / 4;
        sum_weight<<<(numbers + 255) / 256, 256, 0, stream>>>((float4*)dw, (float4*)dw_sum, numbers, count);
    }
};

// Relative error; counts NaN.
struct Error {
    double difference = 0, norm = 0;
    void add(double x, double expected) {
        difference += (x - expected) * (x - expected), norm += expected * expected;
    }
    double value() const {
        const double e = std::sqrt(difference / norm);
        return std::isfinite(e) ? e : 1e30;
    }
};
template <class T>
std::vector<T> download(const void* p, size_t n) {
    std::vector<T> x(n);
    check(cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return x;
}
long count_nan(const std::vector<float>& x) {
    long n = 0;
    for (float y : x) n += std::isnan(y);
    return n;
}
double error_of_sums(const Problem& p, const std::vector<double>& expected, long& nan) {
    const auto x = download<float>(p.s, (size_t)p.batch * J * D);
    Error e;
    nan += count_nan(x);
    for (size_t n = 0; n < p.samples.size(); ++n)
        for (int m = 0; m < J * D; ++m) e.add(x[(size_t)p.samples[n] * J * D + m], expected[n * J * D + m]);
    return e.value();
}
template <Variant kV>
void errors_of_saved(const Problem& p, double& error_c, double& error_db, long& nan) {
    const size_t numbers = (size_t)I * p.batch * J * 2;
    std::vector<float> x(numbers);
    if (kV == kBf16) {
        const auto raw = download<uint16_t>(p.saved[1], numbers);
        for (size_t n = 0; n < numbers; ++n) {
            const uint32_t y = (uint32_t)raw[n] << 16;
            std::copy((const char*)&y, (const char*)&y + 4, (char*)&x[n]);
        }
    } else {
        x = download<float>(p.saved[1], numbers);
    }
    Error c, db;
    nan += count_nan(x);
    for (size_t n = 0; n < p.capsules.size(); ++n)
        for (int b = 0; b < p.batch; ++b)
            for (int j = 0; j < J; ++j) {
                const float* from = &x[(((size_t)p.capsules[n] * (p.batch / 8) + b / 8) * J + j) * 16];
                const size_t at = (n * p.batch + b) * J + j;
                c.add(from[saved_at<kV>(b % 8, 0)], p.c[at]), db.add(from[saved_at<kV>(b % 8, 1)], p.db[at]);
            }
    error_c = c.value(), error_db = db.value();
}

template <class... Expected, class... Arguments>
void launch_kernel(void (*kernel)(Expected...), dim3 grid, int threads, int shared, int cluster,
                   Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute;
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared,
    config.stream = stream;
    if (cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.attrs = &attribute, config.numAttrs = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(arguments)...));
}
template <class Kernel>
void print_resources(const std::string& common, Kernel kernel, int threads, int shared, int cluster) {
    attempt_in_time("\"part\":\"resources\"," + common, [&] {
        cudaFuncAttributes has;
        int blocks = 0, clusters = 0;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        check(cudaFuncGetAttributes(&has, kernel));
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared));
        if (cluster > 1) {
            cudaLaunchConfig_t config = {};
            cudaLaunchAttribute attribute;
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
            config.gridDim = dim3(cluster * processors), config.blockDim = dim3(threads);
            config.dynamicSmemBytes = shared, config.attrs = &attribute, config.numAttrs = 1;
            check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
        }
        printf(
            "{\"part\":\"resources\",%s,\"registers\":%d,\"local_bytes\":%zu,\"shared_bytes\":%d,\"static_"
            "shared_"
            "bytes\":%zu,\"blocks_sm\":%d,\"clusters\":%d}\n",
            common.c_str(), has.numRegs, has.localSizeBytes, shared, has.sharedSizeBytes, blocks, clusters);
    });
}

template <Variant kV>
void arrange(Problem& p) {
    const std::string label = std::string("\"part\":\"arrange\",\"variant\":\"") + kNames[kV] +
                              "\",\"batch\":" + std::to_string(p.batch);
    attempt_in_time(label, [&] {
        auto weight = [&](int) {
            arrange_weight<kV><<<(I * J * 32 + 255) / 256, 256, 0, stream>>>(p.w, p.arranged_w);
        };
        auto input = [&](int) {
            arrange_input<kV><<<(I * p.batch * 2 + 255) / 256, 256, 0, stream>>>(p.u, p.arranged_u, p.batch);
        };
        auto arrays = [&](int) {
            const Arrays a = {{p.x[0], p.x[1], p.x[2], p.x[3], p.x[4]}};
            const int threads = p.batch * kArrays * J * D / (kV == kBf16 ? 8 : 4);
            arrange_x<kV><<<(threads + 255) / 256, 256, 0, stream>>>(a, p.arranged_x, p.batch);
        };
        const double w_us = graph_us(weight), u_us = graph_us(input), x_us = graph_us(arrays);
        printf("{%s,\"weight_us\":%.2f,\"input_us\":%.2f,\"arrays_us\":%.2f}\n", label.c_str(), w_us, u_us,
               x_us);
    });
}

// The passes of one configuration. part: what the lines are called.
template <class C>
struct Runner {
    Problem& p;
    const char* part;
    int rows;
    std::string common;

    static auto kernel() {
        if constexpr (C::kV == kFp32x3)
            return &reduce_fp32x3<C>;
        else if constexpr (C::kPipelined)
            return &pass_pipelined<C>;
        else
            return &pass_products<C>;
    }
    Runner(Problem& p, const char* part) : p(p), part(part), rows(p.batch / 16 / C::kTiles) {
        char text[200];
        snprintf(text, sizeof text,
                 "\"variant\":\"%s\",\"batch\":%d,\"warps\":%d,\"split\":%d,\"step\":%d,\"stages\":%d,\"load_"
                 "v\":%d,"
                 "\"cluster\":%d",
                 kNames[C::kV], p.batch, C::kWarps, C::kSplit, C::kStep, C::kStages, C::kLoadV, C::kCluster);
        common = text;
        print_resources(std::string("\"of\":\"") + part + "\"," + common, kernel(), C::kWarps * 32,
                        C::kShared, C::kCluster);
    }
    void launch(int chunks, int iteration, void* saved, const Mode& mode) const {
        const float *V = p.x[iteration == 3 ? kV2 : kV1], *dS = p.x[iteration == 3 ? kDS3 : kDS2];
        launch_kernel(kernel(), dim3(chunks, rows), C::kWarps * 32, C::kShared, C::kCluster,
                      (const char*)p.arranged_w, (const char*)p.arranged_u, V, dS, p.parts, saved, p.batch,
                      mode);
    }
    // Blocks for `multiple` of each multiprocessor.
    int chunks_of(int multiple) const {
        const int c = std::min(I, std::max(1, multiple * processors / rows));
        return std::max(C::kCluster, c / C::kCluster * C::kCluster);
    }
    std::string label(int chunks, const char* name) const {
        return std::string("\"part\":\"") + part + "\"," + common + ",\"mode\":\"" + name +
               "\",\"chunks\":" + std::to_string(chunks) + ",\"blocks\":" + std::to_string(chunks * rows);
    }
    void complete(int chunks, bool with_saved = false) const {
        const std::string line = label(chunks, with_saved ? "saving" : "complete");
        attempt_in_time(line, [&] {
            const int sums = chunks / C::kCluster;
            const size_t floats = (size_t)sums * p.batch * J * D;
            if (floats > p.parts_floats || chunks % C::kCluster) throw std::runtime_error("chunks");
            check(cudaMemsetAsync(p.parts, 0xFF, sizeof(float) * floats, stream));
            check(cudaMemsetAsync(p.s, 0xFF, sizeof(float) * p.batch * J * D, stream));
            p.use_saved(C::kV);
            check(cudaMemsetAsync(p.saved[0], 0xFF, 2 * p.saved_bytes, stream));
            void* saved = with_saved ? p.saved[1] : nullptr;
            launch(chunks, 3, saved, {});
            p.launch_sum(sums), check(cudaGetLastError());
            check(cudaStreamSynchronize(stream));
            long nan = 0;
            const double error = error_of_sums(p, C::kBackward ? p.backward : p.forward, nan);
            const double bound = kBounds[C::kV];
            double error_c = 0, error_db = 0;
            if (with_saved) errors_of_saved<C::kV>(p, error_c, error_db, nan);
            const bool right = nan == 0 && error <= bound && error_c <= bound && error_db <= bound;
            if (!right) failed = true;
            const int n = p.launches;
            const double us = graph_us([&](int) { launch(chunks, 3, saved, {}); }, n);
            const double sum = graph_us([&](int) { p.launch_sum(sums); }, n);
            const double both = graph_us([&](int) { launch(chunks, 3, saved, {}), p.launch_sum(sums); }, n);
            printf("{%s,\"us\":%.2f,\"sum_us\":%.2f,\"with_sum_us\":%.2f,\"error\":%.2e", line.c_str(), us,
                   sum, both, error);
            if (with_saved) printf(",\"error_c\":%.2e,\"error_db\":%.2e", error_c, error_db);
            printf(",\"nan\":%ld%s}\n", nan, right ? "" : ",\"failed\":\"error\"");
        });
    }
    void changed(int chunks, const char* name, const Mode& mode) const {
        const std::string line = label(chunks, name);
        attempt_in_time(line, [&] {
            const double us = graph_us([&](int) { launch(chunks, 3, nullptr, mode); });
            printf("{%s,\"us\":%.2f}\n", line.c_str(), us);
        });
    }
    void diagnose(int chunks) const {
        complete(chunks);
        changed(chunks, "no_store", {kNoStore});
        changed(chunks, "no_capsule", {0, 0});
        changed(chunks, "no_capsule_no_store", {kNoStore, 0});
        changed(chunks, "one_capsule", {0, 1});
        changed(chunks, "one_capsule_no_store", {kNoStore, 1});
        changed(chunks, "one_stage", {kOneStage});
        changed(chunks, "one_stage_no_barrier", {kOneStage | kNoBarrier});
        changed(chunks, "one_stage_no_barrier_no_store", {kOneStage | kNoBarrier | kNoStore});
        changed(chunks, "each_capsule_twice", {0, I, 2});
        changed(chunks, "each_capsule_4_times", {0, I, 4});
    }
};
template <class C>
void run_splits(Problem& p, const char* part, std::vector<int> multiples) {
    Runner<C> r(p, part);
    for (int m : multiples) r.complete(r.chunks_of(m));
}
template <class C>
void run_diagnosis(Problem& p, std::vector<int> multiples) {
    Runner<C> r(p, "diagnosis");
    for (int m : multiples) r.diagnose(r.chunks_of(m));
}
template <Variant kV, int kStep, int kStages>
void run_ring(Problem& p) {
    run_splits<Config<kV, 4, 1, false, 8, kStep, kStages>>(p, "ring", {1, 2});
}
template <class C>
void run_pipelined(Problem& p, std::vector<int> multiples) {
    Runner<C> r(p, "pipelined");
    for (int m : multiples) {
        const int chunks = r.chunks_of(m);
        r.complete(chunks);
        if (p.batch > 128) continue;
        r.changed(chunks, "no_store", {kNoStore});
        r.changed(chunks, "one_capsule", {0, 1});
    }
}
template <class C>
void run_saving(Problem& p, std::vector<int> multiples) {
    Runner<C> r(p, "backward");
    for (int m : multiples) r.complete(r.chunks_of(m)), r.complete(r.chunks_of(m), true);
}

template <Variant kV, int kPairs, int kStages, int kMinBlocks, class Saver>
void run_gradient(Problem& p, std::vector<int> part_counts) {
    auto* kernel = &gradient<kV, kPairs, kStages, kMinBlocks>;
    constexpr int shared = kGradientShared<kV, kPairs, kStages>;
    const int blocks = (I / 2 + kPairs - 1) / kPairs;
    const std::string common =
        std::string("\"variant\":\"") + kNames[kV] + "\",\"batch\":" + std::to_string(p.batch) +
        ",\"pairs\":" + std::to_string(kPairs) + ",\"stages\":" + std::to_string(kStages);
    print_resources("\"of\":\"gradient\"," + common, kernel, kPairs * 64, shared, 1);
    for (int count : part_counts) {
        const std::string line = "\"part\":\"gradient\"," + common + ",\"parts\":" + std::to_string(count) +
                                 ",\"blocks\":" + std::to_string(blocks * count);
        attempt_in_time(line, [&] {
            const size_t u_numbers = (size_t)p.batch * I * K, w_numbers = (size_t)I * J * D * K;
            if (count > Problem::kWeightParts || p.batch / (kV == kBf16 ? 16 : 8) < count)
                throw std::runtime_error("parts");
            Saver saver(p, "saver");
            p.use_saved(kV);
            check(cudaMemsetAsync(p.saved[0], 0xFF, 2 * p.saved_bytes, stream));
            saver.launch(saver.chunks_of(1), 2, p.saved[0], {});
            saver.launch(saver.chunks_of(1), 3, p.saved[1], {});
            check(cudaMemsetAsync(p.du, 0xFF, sizeof(float) * u_numbers, stream));
            check(cudaMemsetAsync(p.dw, 0xFF, sizeof(float) * w_numbers * count, stream));
            check(cudaMemsetAsync(p.dw_sum, 0xFF, sizeof(float) * w_numbers, stream));
            auto launch = [&](int) {
                launch_kernel(kernel, dim3(blocks, count), kPairs * 64, shared, 1, (const float*)p.w,
                              (const float*)p.u, (const char*)p.arranged_x, (const char*)p.saved[0], p.du,
                              p.dw, p.batch);
            };
            launch(0);
            if (count > 1) p.launch_sum_weight(count), check(cudaGetLastError());
            check(cudaStreamSynchronize(stream));
            const auto du = download<float>(p.du, u_numbers),
                       dw = download<float>(count > 1 ? p.dw_sum : p.dw, w_numbers);
            const long nan = count_nan(du) + count_nan(dw);
            Error eu, ew;
            for (size_t n = 0; n < p.capsules.size(); ++n) {
                const int i = p.capsules[n];
                for (int b = 0; b < p.batch; ++b)
                    for (int k = 0; k < K; ++k)
                        eu.add(du[((size_t)b * I + i) * K + k], p.grad_u[(n * p.batch + b) * K + k]);
                for (int m = 0; m < J * D * K; ++m)
                    ew.add(dw[(size_t)i * J * D * K + m], p.grad_w[n * J * D * K + m]);
            }
            const bool right = nan == 0 && eu.value() <= kBounds[kV] && ew.value() <= kBounds[kV];
            if (!right) failed = true;
            const double us = graph_us(launch, p.launches);
            const double sum = count > 1 ? graph_us([&](int) { p.launch_sum_weight(count); }, p.launches) : 0;
            const double both =
                count > 1 ? graph_us([&](int n) { launch(n), p.launch_sum_weight(count); }, p.launches) : us;
            printf(
                "{%s,\"us\":%.2f,\"sum_us\":%.2f,\"with_sum_us\":%.2f,\"error_u\":%.2e,\"error_w\":%.2e,"
                "\"nan\":%ld%s}\n",
                line.c_str(), us, sum, both, eu.value(), ew.value(), nan,
                right ? "" : ",\"failed\":\"error\"");
        });
    }
}

using BackwardTf32 = Config<kTf32, 4, 2, true, 12>;
using BackwardBf16 = Config<kBf16, 4, 2, true, 16>;

void run_forward(Problem& p) {
    arrange<kTf32>(p);
    run_diagnosis<Config<kTf32, 4, 1, false, 8>>(p, {1, 2});
    run_diagnosis<Config<kTf32, 8, 1, false, 8>>(p, {1});
    run_ring<kTf32, 1, 2>(p), run_ring<kTf32, 1, 3>(p), run_ring<kTf32, 1, 4>(p), run_ring<kTf32, 1, 6>(p);
    run_ring<kTf32, 2, 2>(p), run_ring<kTf32, 2, 3>(p), run_ring<kTf32, 2, 6>(p);
    run_ring<kTf32, 4, 2>(p), run_ring<kTf32, 4, 3>(p), run_ring<kTf32, 4, 4>(p), run_ring<kTf32, 4, 6>(p);
    run_splits<Config<kTf32, 4, 1, false, 8, 2, 4, 1>>(p, "load_v", {1, 2});
    run_splits<Config<kTf32, 4, 1, false, 8, 2, 4, 2>>(p, "load_v", {1, 2});
    run_splits<Config<kTf32, 4, 1, false, 8, 2, 4, 3>>(p, "load_v", {1, 2});
    run_splits<Config<kTf32, 4, 1, false, 8, 2, 4, 1, 2>>(p, "cluster", {1, 2});
    run_splits<Config<kTf32, 4, 1, false, 8, 2, 4, 1, 4>>(p, "cluster", {1, 2});
    run_splits<Config<kTf32, 4, 1, false, 8, 2, 4, 1, 8>>(p, "cluster", {1, 2});
    run_splits<Config<kTf32, 4, 2, false, 16, 2, 4, 3>>(p, "split", {1, 2, 3, 4});
    run_splits<Config<kTf32, 8, 2, false, 16, 2, 4, 3>>(p, "split", {1, 2});
    run_splits<Config<kTf32, 16, 2, false, 16, 2, 4, 3>>(p, "split", {1});
    run_splits<Config<kTf32, 8, 2, false, 8, 2, 4, 3, 4>>(p, "split_cluster", {1, 2});
    run_pipelined<Config<kTf32, 4, 1, false, 8, 1, 4, 3, 1, true>>(p, {1, 2});
    run_pipelined<Config<kTf32, 8, 1, false, 8, 1, 6, 3, 1, true>>(p, {1});
    run_pipelined<Config<kTf32, 4, 1, false, 8, 1, 4, 3, 2, true>>(p, {1, 2});
    run_pipelined<Config<kTf32, 4, 1, false, 8, 1, 4, 3, 4, true>>(p, {1, 2});
    arrange<kBf16>(p);
    run_diagnosis<Config<kBf16, 4, 1, false, 8>>(p, {1, 2});
    run_ring<kBf16, 1, 4>(p), run_ring<kBf16, 2, 3>(p);
    run_splits<Config<kBf16, 4, 1, false, 8, 2, 4, 2>>(p, "load_v", {1, 2});
    run_splits<Config<kBf16, 4, 1, false, 8, 2, 4, 3>>(p, "load_v", {1, 2});
    run_splits<Config<kBf16, 4, 1, false, 8, 2, 4, 1, 4>>(p, "cluster", {1, 2});
    run_splits<Config<kBf16, 4, 2, false, 16, 2, 4, 3>>(p, "split", {1, 2, 3, 4});
    run_splits<Config<kBf16, 8, 2, false, 16, 2, 4, 3>>(p, "split", {1, 2});
    run_splits<Config<kBf16, 8, 2, false, 16, 2, 4, 3, 4>>(p, "split_cluster", {1, 2});
    run_pipelined<Config<kBf16, 4, 1, false, 8, 1, 4, 3, 1, true>>(p, {1, 2});
    run_pipelined<Config<kBf16, 4, 1, false, 8, 1, 4, 3, 4, true>>(p, {1, 2});
}
void run_backward(Problem& p) {
    arrange<kTf32>(p);
    run_saving<BackwardTf32>(p, {1, 2, 3});
    run_saving<Config<kTf32, 4, 2, true, 12, 2, 4, 3>>(p, {1, 2, 3});
    run_saving<Config<kTf32, 8, 2, true, 8, 2, 4, 3>>(p, {1});
    run_splits<Config<kTf32, 4, 2, true, 8, 1, 4, 3>>(p, "backward", {1, 2});
    run_splits<Config<kTf32, 4, 2, true, 12, 2, 4, 1, 4>>(p, "backward", {1, 2, 3});
    arrange<kBf16>(p);
    run_saving<BackwardBf16>(p, {1, 2, 3, 4});
    run_saving<Config<kBf16, 4, 2, true, 16, 2, 4, 3>>(p, {1, 2, 3, 4});
    run_saving<Config<kBf16, 8, 2, true, 16, 2, 4, 3>>(p, {1, 2});
    run_saving<Config<kBf16, 4, 1, true, 8, 2, 4, 3>>(p, {1, 2});
    run_splits<Config<kBf16, 4, 2, true, 16, 2, 4, 1, 4>>(p, "backward", {1, 2, 3, 4});
    arrange<kFp32x3>(p);
    run_saving<Config<kFp32x3, 4, 2, true, 8>>(p, {1, 2});
    run_saving<Config<kFp32x3, 4, 2, true, 8, 2, 4, 3>>(p, {1, 2});
    run_saving<Config<kFp32x3, 8, 2, true, 8>>(p, {1});
}
void run_gradients(Problem& p) {
    const std::vector<int> counts = p.batch == 128 ? std::vector<int>{1, 2, 4} : std::vector<int>{1, 2, 4, 8};
    using Tf32 = Runner<BackwardTf32>;
    using Bf16 = Runner<BackwardBf16>;
    using Fp32 = Runner<Config<kFp32x3, 4, 2, true, 8>>;
    arrange<kTf32>(p);
    run_gradient<kTf32, 2, 2, 2, Tf32>(p, counts);
    run_gradient<kTf32, 4, 3, 1, Tf32>(p, counts);
    run_gradient<kTf32, 5, 3, 1, Tf32>(p, counts);
    run_gradient<kTf32, 5, 4, 1, Tf32>(p, counts);
    arrange<kBf16>(p);
    run_gradient<kBf16, 2, 2, 3, Bf16>(p, counts);
    run_gradient<kBf16, 4, 3, 1, Bf16>(p, counts);
    run_gradient<kBf16, 5, 3, 1, Bf16>(p, counts);
    run_gradient<kBf16, 5, 4, 1, Bf16>(p, counts);
    arrange<kFp32x3>(p);
    run_gradient<kFp32x3, 2, 2, 2, Fp32>(p, counts);
    run_gradient<kFp32x3, 4, 3, 1, Fp32>(p, counts);
    run_gradient<kFp32x3, 5, 3, 1, Fp32>(p, counts);
}

int main() {
    attempt_in_time("\"part\":\"device\"", [] {
        cudaDeviceProp device;
        check(cudaGetDeviceProperties(&device, 0));
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        processors = device.multiProcessorCount;
        printf("{\"part\":\"device\",\"name\":\"%s\",\"multiprocessors\":%d}\n", device.name, processors);
    });
    if (failed) return 1;
    for (int batch : {128, 1024})
        attempt_in_time("\"part\":\"problem\",\"batch\":" + std::to_string(batch), [&] {
            Problem p(batch);
            if (batch == 128) {
                run_forward(p);
            } else {  // the marginal rate
                arrange<kTf32>(p);
                run_splits<Config<kTf32, 4, 1, false, 8>>(p, "forward", {1, 2});
                run_splits<Config<kTf32, 4, 1, false, 8, 2, 4, 3>>(p, "load_v", {1, 2});
                run_splits<Config<kTf32, 8, 2, false, 16, 2, 4, 3>>(p, "split", {1, 2});
                run_pipelined<Config<kTf32, 4, 1, false, 8, 1, 4, 3, 1, true>>(p, {1, 2});
                arrange<kBf16>(p);
                run_splits<Config<kBf16, 4, 1, false, 8>>(p, "forward", {1, 2});
                run_splits<Config<kBf16, 8, 2, false, 16, 2, 4, 3>>(p, "split", {1, 2});
                run_pipelined<Config<kBf16, 4, 1, false, 8, 1, 4, 3, 1, true>>(p, {1, 2});
            }
            run_backward(p);
            run_gradients(p);
        });
    return failed ? 1 : 0;
}
