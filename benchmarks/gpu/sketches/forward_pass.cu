// A routing pass after the first, for J = 10, D = 16, K = 8, in three precisions, and the rates that bound
// it. Prints one JSON object a line.
//   nvcc -O3 -std=c++17 -arch=sm_90 benchmarks/gpu/sketches/forward_pass.cu -o forward_pass && ./forward_pass
//
// A warp holds 16 samples. In TF32 and bfloat16 both steps of the pass are matrix products with W_ij alone:
//   logit_ij = sum_k u_ik (sum_d V_jd W_ijdk)     V is the A operand (in registers), u multiplies the result;
//   s_jd    += sum_k (c_ij u_ik) W_ijdk           c u is the A operand, s the accumulator.
// float32 forms u_hat once, from three TF32 products, and holds it; there two warps share the output
// capsules.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

constexpr int J = 10, D = 16, K = 8, I = 1152;
constexpr int kStep = 2, kStages = 4;  // input capsules a stage, stages of the ring in shared memory
constexpr float kLog2e = 1.44269504f;
enum Variant { kTf32, kBf16, kFp32x3 };
constexpr const char* kNames[] = {"tf32", "bf16", "fp32x3"};
constexpr double kBounds[] = {2e-3, 1e-2, 1e-5};

template <Variant kV>
constexpr int kWBytes = J * D * K * (kV == kBf16 ? 2 : 4);  // W of one input capsule
template <Variant kV>
constexpr int kUBytes = 16 * K * (kV == kBf16 ? 2 : 4);  // one input capsule of 16 samples
template <Variant kV, int kWarps>
constexpr int kTiles = kV == kFp32x3 ? kWarps / 2 : kWarps;  // tiles of 16 samples in a block
template <Variant kV, int kWarps>
constexpr int kShared = kStages * kStep * (kWBytes<kV> + kTiles<kV, kWarps> * kUBytes<kV>);
template <Variant kV, int kWarps>
constexpr int kMinBlocks = kWarps >= 8 ? 1 : (kV == kTf32 ? 8 : 12) / kWarps;

// ---- instructions ----

using U = uint32_t;
__device__ __forceinline__ U bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ void mma_tf32(float* c, U a0, U a1, U a2, U a3, U b0, U b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16_k8(float* c, U a0, U a1, U b0) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void mma_bf16_k16(float* c, U a0, U a1, U a2, U a3, U b0, U b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ U shared_address(const void* p) { return (U)__cvta_generic_to_shared(p); }
template <bool kTranspose>
__device__ __forceinline__ uint4 ldmatrix(U p) {
    uint4 r;
    if constexpr (kTranspose)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                     : "r"(p)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                     : "r"(p)
                     : "memory");
    return r;
}
__device__ __forceinline__ float exp2_fast(float x) {
    asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ __forceinline__ float reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ __forceinline__ U round_tf32(float x) {
    U r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ U pack_bf16(float lo, float hi) {
    U r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
__device__ __forceinline__ U multiply_bf16(U a, U b) {
    U r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
// A barrier of two warps. Constant numbers: a variable one would reserve all 16 barriers for each block.
__device__ __forceinline__ void pair_barrier(int pair) {
    if (pair == 0) asm volatile("bar.sync 1, 64;" ::: "memory");
    if (pair == 1) asm volatile("bar.sync 2, 64;" ::: "memory");
    if (pair == 2) asm volatile("bar.sync 3, 64;" ::: "memory");
    if (pair == 3) asm volatile("bar.sync 4, 64;" ::: "memory");
}
// The part of x that TF32 holds; x minus it is exact.
__device__ __forceinline__ float high_part(float x) { return __uint_as_float(bits(x) & 0xffffe000u); }

// ---- inputs in the order of the fragments ----
// Lane = 4 g + t. TF32 and float32:
// W_ij is 8 rows (two d each) of 4 chunks of 16 bytes (two k each), chunk c of row r stored at c ^ swap(r),
// so that it is read without bank conflicts as W (row g) and as its transpose (row t). bfloat16: W as it is;
// ldmatrix reads both. u: [I][B / 16][32 lanes][u of g, 2t; g, 2t + 1; g + 8, 2t; g + 8, 2t + 1].

__host__ __device__ constexpr int swap(int row) { return row & 2; }

template <Variant kV>
__device__ __forceinline__ void store4(void* out, size_t n, float a, float b, float c, float d) {
    if constexpr (kV == kBf16)
        static_cast<uint2*>(out)[n] = make_uint2(pack_bf16(a, b), pack_bf16(c, d));
    else if constexpr (kV == kTf32)
        static_cast<uint4*>(out)[n] = make_uint4(round_tf32(a), round_tf32(b), round_tf32(c), round_tf32(d));
    else
        static_cast<float4*>(out)[n] = make_float4(a, b, c, d);
}
template <Variant kV>
__global__ void arrange_weight(const float* __restrict__ w, void* out) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;  // four numbers a thread
    if (n >= I * J * 32) return;
    if constexpr (kV == kBf16) {
        const float4 x = reinterpret_cast<const float4*>(w)[n];
        store4<kV>(out, n, x.x, x.y, x.z, x.w);
    } else {
        const int ij = n >> 5, row = (n >> 2) & 7, chunk = (n & 3) ^ swap(row);
        const float* from = w + (ij * D + 2 * row) * K + 2 * chunk;
        const float2 even = *reinterpret_cast<const float2*>(from),
                     odd = *reinterpret_cast<const float2*>(from + K);
        if constexpr (kV == kTf32)
            store4<kV>(out, n, even.x, odd.x, even.y, odd.y);
        else  // needs W itself alone: pairs of k
            store4<kV>(out, n, even.x, even.y, odd.x, odd.y);
    }
}
template <Variant kV>
__global__ void arrange_input(const float* __restrict__ u, void* out, int batch) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= I * batch * 2) return;
    const int lane = n & 31, tile = (n >> 5) % (batch / 16), i = (n >> 5) / (batch / 16);
    const float* from = u + ((size_t)(tile * 16 + (lane >> 2)) * I + i) * K + 2 * (lane & 3);
    const float2 a = *reinterpret_cast<const float2*>(from);
    const float2 b = *reinterpret_cast<const float2*>(from + (size_t)8 * I * K);
    if constexpr (kV == kFp32x3)  // the A operand itself
        store4<kV>(out, n, a.x, b.x, a.y, b.y);
    else
        store4<kV>(out, n, a.x, a.y, b.x, b.y);
}

// ---- what the passes share ----

// A ring of stages in shared memory, each with kStep input capsules: W first, then u of the block's samples.
template <Variant kV, int kWarps>
struct Ring {
    static constexpr int kW = kWBytes<kV>, kU = kTiles<kV, kWarps> * kUBytes<kV>, kBytes = kStep * (kW + kU);
    char* shared;
    const char *w, *u;
    size_t stride;  // bytes from an input capsule's u to the next one's
    int first, last;

    __device__ __forceinline__ static void copy(char* to, const char* from, int bytes) {
#pragma unroll 1
        for (int n = threadIdx.x * 16; n < bytes; n += kWarps * 32 * 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + n)),
                         "l"(from + n)
                         : "memory");
    }
    __device__ __forceinline__ void load(int step) {
        const int i = first + step * kStep, n = min(kStep, last - i);
        char* to = shared + step % kStages * kBytes;
        if (n > 0) copy(to, w + (size_t)i * kW, n * kW);
#pragma unroll 1
        for (int k = 0; k < n; ++k) copy(to + kStep * kW + k * kU, u + (i + k) * stride, kU);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    // Calls body(W of the input capsule, u of it) for each input capsule of the block.
    template <class Body>
    __device__ __forceinline__ void run(Body body) {
#pragma unroll 1
        for (int step = 0; step < kStages - 1; ++step) load(step);
        for (int step = 0; first + step * kStep < last; ++step) {
            asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
            __syncthreads();
            load(step + kStages - 1);
            const char* stage = shared + step % kStages * kBytes;
            const int n = min(kStep, last - first - step * kStep);
#pragma unroll 1
            for (int k = 0; k < n; ++k) body(stage + k * kW, stage + kStep * kW + k * kU);
        }
    }
};
template <Variant kV, int kWarps>
__device__ __forceinline__ Ring<kV, kWarps> make_ring(char* shared, const char* w, const char* u, int batch) {
    const int c = blockIdx.x, chunks = gridDim.x;
    return {shared,
            w,
            u + (size_t)blockIdx.y * kTiles<kV, kWarps> * kUBytes<kV>,
            (size_t)batch / 16 * kUBytes<kV>,
            I * c / chunks,
            I * (c + 1) / chunks};
}
// Sums x[row][j] over the four lanes of a row by tensor core; every lane gets all sums. A's column t holds j,
// column t + 4 holds j + 1; B sends them to the even and the odd columns. kExact: in two parts, else in TF32.
template <bool kExact, int kJ>
__device__ __forceinline__ void quad_sum(float (&x)[2][kJ], U even, U odd) {
#pragma unroll
    for (int j = 0; j < kJ; j += 2) {
        const int k = j + 1 < kJ ? j + 1 : j;  // an odd kJ sends its last one twice
        const float in[4] = {x[0][j], x[1][j], x[0][k], x[1][k]};
        float c[4] = {};
        if constexpr (kExact) {
            float hi[4], lo[4];
            for (int n = 0; n < 4; ++n) hi[n] = high_part(in[n]), lo[n] = in[n] - hi[n];
            mma_tf32(c, bits(lo[0]), bits(lo[1]), bits(lo[2]), bits(lo[3]), even, odd);
            mma_tf32(c, bits(hi[0]), bits(hi[1]), bits(hi[2]), bits(hi[3]), even, odd);
        } else {
            mma_tf32(c, bits(in[0]), bits(in[1]), bits(in[2]), bits(in[3]), even, odd);
        }
        x[0][j] = c[0], x[1][j] = c[2];
        if (j + 1 < kJ) x[0][k] = c[1], x[1][k] = c[3];
    }
}
template <int kJ>
__device__ __forceinline__ void exponentials(float (&x)[kJ], float& top, float& sum) {
    float m[2] = {x[0], x[1]}, s[2] = {};
#pragma unroll
    for (int j = 2; j < kJ; ++j) m[j & 1] = fmaxf(m[j & 1], x[j]);
    top = fmaxf(m[0], m[1]);
#pragma unroll
    for (int j = 0; j < kJ; ++j) x[j] = exp2_fast(x[j] - top), s[j & 1] += x[j];
    sum = s[0] + s[1];
}

// ---- the passes ----

template <Variant kV, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks<kV, kWarps>)
    pass_products(const char* __restrict__ w, const char* __restrict__ u, const float* __restrict__ V,
                  float* __restrict__ parts, int batch) {
    extern __shared__ __align__(128) char shared[];
    constexpr int kA = kV == kBf16 ? 4 : 8;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int sample = (blockIdx.y * kWarps + warp) * 16 + g;
    const U even = bits(g & 1 ? 0.f : 1.f), odd = bits(g & 1 ? 1.f : 0.f);
    U a[J][kA];  // V log2(e), d = 2t, 2t + 1 and 8 more, rows g and g + 8
    float s[J][8] = {};
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int row = n & 1, half = n >> 1;
            const float2 x =
                *reinterpret_cast<const float2*>(V + ((sample + 8 * row) * J + j) * D + 8 * half + 2 * t);
            if constexpr (kV == kBf16)
                a[j][n] = pack_bf16(x.x * kLog2e, x.y * kLog2e);
            else
                a[j][4 * half + row] = round_tf32(x.x * kLog2e),
                                a[j][4 * half + 2 + row] = round_tf32(x.y * kLog2e);
        }
    const int straight = g * 16 + (t ^ swap(g)) * 4;                         // d = 2g, 2g + 1, k = 2t, 2t + 1
    const int transposed = t * 16 + ((g >> 1) ^ swap(t)) * 4 + (g & 1) * 2;  // d = 2t, 2t + 1, k = g

    make_ring<kV, kWarps>(shared, w, u, batch).run([&](const char* wi, const char* ui) {
        float4 x;
        uint2 packed = {};
        if constexpr (kV == kBf16) {
            packed = reinterpret_cast<const uint2*>(ui)[threadIdx.x];
            x = make_float4(__uint_as_float(packed.x << 16), __uint_as_float(packed.x & 0xffff0000u),
                            __uint_as_float(packed.y << 16), __uint_as_float(packed.y & 0xffff0000u));
        } else {
            x = reinterpret_cast<const float4*>(ui)[threadIdx.x];
        }
        float e[2][J], top[2], sum[2];
#pragma unroll
        for (int j = 0; j < J; j += 2) {
            float y[2][4] = {};
            if constexpr (kV == kBf16) {
                const uint4 b = ldmatrix<true>(shared_address(wi) + j * 256 + lane * 16);
                mma_bf16_k16(y[0], a[j][0], a[j][1], a[j][2], a[j][3], b.x, b.y);
                mma_bf16_k16(y[1], a[j + 1][0], a[j + 1][1], a[j + 1][2], a[j + 1][3], b.z, b.w);
            } else {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const U* v = a[j + n];
                    const float* from = reinterpret_cast<const float*>(wi) + (j + n) * 128 + transposed;
                    const uint2 b = *reinterpret_cast<const uint2*>(from);
                    const uint2 c = *reinterpret_cast<const uint2*>(from + 64);
                    mma_tf32(y[n], v[0], v[1], v[2], v[3], b.x, b.y);
                    mma_tf32(y[n], v[4], v[5], v[6], v[7], c.x, c.y);
                }
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                e[0][j + n] = y[n][0] * x.x + y[n][1] * x.y;
                e[1][j + n] = y[n][2] * x.z + y[n][3] * x.w;
            }
        }
        quad_sum<false>(e, even, odd);
        exponentials(e[0], top[0], sum[0]);
        exponentials(e[1], top[1], sum[1]);
        if constexpr (kV == kBf16) {
            const float r0 = reciprocal(sum[0]), r1 = reciprocal(sum[1]);
            const U x0 = pack_bf16(x.x * r0, x.y * r0), x1 = pack_bf16(x.z * r1, x.w * r1);
#pragma unroll
            for (int j = 0; j < J; j += 2) {
                const uint4 b = ldmatrix<false>(shared_address(wi) + j * 256 + lane * 16);
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const U c0 = multiply_bf16(pack_bf16(e[0][j + n], e[0][j + n]), x0);
                    const U c1 = multiply_bf16(pack_bf16(e[1][j + n], e[1][j + n]), x1);
                    mma_bf16_k8(s[j + n], c0, c1, n ? b.z : b.x);
                    mma_bf16_k8(s[j + n] + 4, c0, c1, n ? b.w : b.y);
                }
            }
        } else {
            // mma drops the low bits of c u: on average 0.72 / 2^11 of it, given back here.
            const float r0 = reciprocal(sum[0]) * 1.000352f, r1 = reciprocal(sum[1]) * 1.000352f;
            x.x *= r0, x.y *= r0, x.z *= r1, x.w *= r1;
#pragma unroll
            for (int j = 0; j < J; ++j) {
                const uint4 b = *reinterpret_cast<const uint4*>(wi + (j * 128 + straight) * 4);
                const U c[4] = {bits(e[0][j] * x.x), bits(e[1][j] * x.z), bits(e[0][j] * x.y),
                                bits(e[1][j] * x.w)};
                mma_tf32(s[j], c[0], c[1], c[2], c[3], b.x, b.z);
                mma_tf32(s[j] + 4, c[0], c[1], c[2], c[3], b.y, b.w);
            }
        }
    });
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* to = parts + (((size_t)blockIdx.x * batch + sample + 8 * r) * J + j) * D;
            const float* x = s[j] + 2 * r;
            if constexpr (kV == kBf16) {
                *reinterpret_cast<float2*>(to + 2 * t) = make_float2(x[0], x[1]);
                *reinterpret_cast<float2*>(to + 8 + 2 * t) = make_float2(x[4], x[5]);
            } else {
                *reinterpret_cast<float4*>(to + 4 * t) = make_float4(x[0], x[4], x[1], x[5]);
            }
        }
}

template <int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kMinBlocks<kFp32x3, kWarps>)
    pass_fp32x3(const char* __restrict__ w, const char* __restrict__ u, const float* __restrict__ V,
                float* __restrict__ parts, int batch) {
    extern __shared__ __align__(128) char shared[];
    __shared__ float2 exchange[2][kWarps / 2][2][16];  // maximum and sum: two turns, pair of warps, warp, row
    constexpr int kJ = J / 2;
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, pair = threadIdx.x >> 6,
              half = threadIdx.x >> 5 & 1;
    const int sample = (blockIdx.y * (kWarps / 2) + pair) * 16 + g, first_j = half * kJ;
    const U even = bits(g & 1 ? 0.f : 1.f), odd = bits(g & 1 ? 1.f : 0.f);
    float v[kJ][2][4], s[kJ][8] = {};  // d = 4t ... 4t + 3; s in the order of the accumulators
#pragma unroll
    for (int j = 0; j < kJ; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float* from = V + ((sample + 8 * r) * J + first_j + j) * D + 4 * t;
            const float4 x = *reinterpret_cast<const float4*>(from);
            v[j][r][0] = x.x * kLog2e, v[j][r][1] = x.y * kLog2e;
            v[j][r][2] = x.z * kLog2e, v[j][r][3] = x.w * kLog2e;
        }
    const int straight = first_j * 128 + g * 16 + (t ^ swap(g)) * 4;
    int turn = 0;

    make_ring<kFp32x3, kWarps>(shared, w, u, batch).run([&](const char* wi, const char* ui) {
        const float4 x = reinterpret_cast<const float4*>(ui)[pair * 32 + lane];
        const float a[4] = {x.x, x.y, x.z, x.w};
        U ah[4], al[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) ah[n] = bits(high_part(a[n])), al[n] = bits(a[n] - high_part(a[n]));
        float y[kJ][8] = {}, e[2][kJ], top[2], sum[2], scale[2];
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
            for (int r = 0; r < 2; ++r)
                e[r][j] = y[j][2 * r] * v[j][r][0] + y[j][4 + 2 * r] * v[j][r][1] +
                          y[j][2 * r + 1] * v[j][r][2] + y[j][5 + 2 * r] * v[j][r][3];
        }
        quad_sum<true>(e, even, odd);
        exponentials(e[0], top[0], sum[0]);
        exponentials(e[1], top[1], sum[1]);
        float2(*slot)[16] = exchange[turn][pair];
        if (t < 2) slot[half][g + 8 * t] = t ? make_float2(top[1], sum[1]) : make_float2(top[0], sum[0]);
        pair_barrier(pair);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 other = slot[half ^ 1][g + 8 * r];
            const float all = fmaxf(top[r], other.x), mine = exp2_fast(top[r] - all);
            scale[r] = mine * reciprocal(sum[r] * mine + other.y * exp2_fast(other.x - all));
        }
        turn ^= 1;
#pragma unroll
        for (int j = 0; j < kJ; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float c = e[r][j] * scale[r];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const int k = 2 * r + (n & 1) + 4 * (n >> 1);
                    s[j][k] += c * y[j][k];
                }
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

// s = sum of the parts in a fixed order, v = squash(s). A block has 32 groups of four numbers, 8 threads
// each.
__global__ void __launch_bounds__(256)
    sum_parts(const float4* __restrict__ parts, float4* s, float4* v, int numbers, int chunks) {
    __shared__ float4 partial[8][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n = blockIdx.x * 32 + lane;
    float4 x = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int c = warp; c < chunks; c += 8) {
        const float4 p = parts[(size_t)c * numbers + n];
        x.x += p.x, x.y += p.y, x.z += p.z, x.w += p.w;
    }
    partial[warp][lane] = x;
    __syncthreads();
    if (warp > 0) return;
    for (int k = 1; k < 8; ++k) {
        const float4 p = partial[k][lane];
        x.x += p.x, x.y += p.y, x.z += p.z, x.w += p.w;
    }
    float norm = x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    norm += __shfl_xor_sync(~0u, norm, 1);
    norm += __shfl_xor_sync(~0u, norm, 2);
    const float f = sqrtf(norm) / (1.f + norm);
    s[n] = x;
    v[n] = make_float4(x.x * f, x.y * f, x.z * f, x.w * f);
}

// ---- rates ----

__global__ void empty() {}
__global__ void barriers(int n) {
    for (int k = 0; k < n; ++k) cooperative_groups::this_grid().sync();
}
enum Operation { kFma, kMmaTf32, kMmaBf16K8, kMmaBf16K16, kExp2, kShuffle };
constexpr int kRounds = 2048, kChains = 8;
template <Operation kOp>
__global__ void rate(float b, float c, float* sink, long long* cycles) {
    float x[kChains][4];
    for (int n = 0; n < kChains; ++n)
        for (int k = 0; k < 4; ++k) x[n][k] = threadIdx.x * b + n + k;
    const U p = bits(b + threadIdx.x), q = bits(c);
    __syncthreads();
    const long long start = clock64();
#pragma unroll 4
    for (int r = 0; r < kRounds; ++r)
#pragma unroll
        for (int n = 0; n < kChains; ++n) {
            if constexpr (kOp == kFma) x[n][0] = fmaf(x[n][0], b, c);
            if constexpr (kOp == kMmaTf32) mma_tf32(x[n], p, p, p, p, q, q);
            if constexpr (kOp == kMmaBf16K8) mma_bf16_k8(x[n], p, p, q);
            if constexpr (kOp == kMmaBf16K16) mma_bf16_k16(x[n], p, p, p, p, q, q);
            if constexpr (kOp == kExp2) x[n][0] = exp2_fast(x[n][0]);
            if constexpr (kOp == kShuffle) x[n][0] = __shfl_xor_sync(~0u, x[n][0], 1);
        }
    float sum = 0;
    for (int n = 0; n < kChains; ++n) sum += x[n][0] + x[n][1] + x[n][2] + x[n][3];
    if (sum == 12345.678f) *sink = sum;
    __syncthreads();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
}

// ---- host ----

bool failed = false;
int processors = 0;
cudaStream_t stream;

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
// Runs f; a failure prints a line and the program goes on.
template <class F>
void attempt(const std::string& label, F f) {
    try {
        f();
    } catch (const std::exception& error) {
        failed = true;
        printf("{%s,\"failed\":\"%s\"}\n", label.c_str(), error.what());
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        if (cudaStreamIsCapturing(stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone) {
            cudaGraph_t graph = nullptr;
            cudaStreamEndCapture(stream, &graph);
            if (graph) cudaGraphDestroy(graph);
        }
        cudaGetLastError();
    }
    fflush(stdout);
}
template <class T>
T* allocate(size_t n) {
    void* p = nullptr;
    check(cudaMalloc(&p, n * sizeof(T)));
    return static_cast<T*>(p);
}
// Median time of f in microseconds, of 15 after one that does not count.
template <class F>
double median_us(F f) {
    cudaEvent_t start, stop;
    check(cudaEventCreate(&start));
    check(cudaEventCreate(&stop));
    std::vector<float> ms(15);
    for (int n = -1; n < 15; ++n) {
        check(cudaEventRecord(start, stream));
        f();
        check(cudaEventRecord(stop, stream));
        check(cudaEventSynchronize(stop));
        check(cudaEventElapsedTime(&ms[std::max(n, 0)], start, stop));
    }
    check(cudaEventDestroy(start));
    check(cudaEventDestroy(stop));
    std::nth_element(ms.begin(), ms.begin() + 7, ms.end());
    return ms[7] * 1000.;
}
// Time a launch of launch(0), launch(1), ... in a graph.
template <class F>
double graph_us(F launch, int launches = 20) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int n = 0; n < launches; ++n) launch(n), check(cudaGetLastError());
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&exec, graph, 0));
    const double us = median_us([&] { check(cudaGraphLaunch(exec, stream)); });
    check(cudaGraphExecDestroy(exec));
    check(cudaGraphDestroy(graph));
    return us / launches;
}

struct Problem {
    int batch, sets;
    std::vector<int> samples;          // those compared with the reference
    std::vector<double> expected[2];   // s and v of them
    float *u, *w, *V, *parts, *s, *v;  // on the device
    char *arranged_u, *arranged_w;     // `sets` copies
    size_t u_bytes, w_bytes = sizeof(float) * I * J * D * K;

    Problem(int batch, int sets) : batch(batch), sets(sets), u_bytes(sizeof(float) * batch * I * K) {
        std::mt19937 random(batch);
        std::normal_distribution<float> normal;
        std::vector<float> hu((size_t)batch * I * K), hw((size_t)I * J * D * K), hv((size_t)batch * J * D);
        for (float& x : hu) x = 0.3f * normal(random);
        for (float& x : hw) x = 0.1f * normal(random);
        for (float& x : hv) x = 0.125f * normal(random);
        u = upload(hu), w = upload(hw), V = upload(hv);
        parts = allocate<float>((size_t)4 * processors * 8 * 16 * J * D);
        s = allocate<float>(hv.size()), v = allocate<float>(hv.size());
        arranged_u = allocate<char>(u_bytes * sets), arranged_w = allocate<char>(w_bytes * sets);
        check(cudaDeviceSynchronize());
        reference(hu, hw, hv);
    }
    ~Problem() {
        for (void* p : {(void*)u, (void*)w, (void*)V, (void*)parts, (void*)s, (void*)v, (void*)arranged_u,
                        (void*)arranged_w})
            cudaFree(p);
    }
    static float* upload(const std::vector<float>& x) {
        float* p = allocate<float>(x.size());
        check(cudaMemcpy(p, x.data(), x.size() * sizeof(float), cudaMemcpyHostToDevice));
        return p;
    }
    void reference(const std::vector<float>& hu, const std::vector<float>& hw, const std::vector<float>& hv) {
        const int stride = std::max(1, batch / 128);
        for (int n = 0; n < 128; ++n) samples.push_back(n * stride + n / 2 % stride);
        for (auto& x : expected) x.assign(samples.size() * J * D, 0.);
        for (size_t n = 0; n < samples.size(); ++n) {
            double* out = &expected[0][n * J * D];
            for (int i = 0; i < I; ++i) {
                double y[J * D], c[J], top = -1e300, sum = 0;
                const float* x = &hu[((size_t)samples[n] * I + i) * K];
                for (int m = 0; m < J * D; ++m) {
                    y[m] = 0;
                    for (int k = 0; k < K; ++k) y[m] += (double)hw[((size_t)i * J * D + m) * K + k] * x[k];
                }
                for (int j = 0; j < J; ++j) {
                    c[j] = 0;
                    for (int d = 0; d < D; ++d)
                        c[j] += y[j * D + d] * hv[((size_t)samples[n] * J + j) * D + d];
                    top = std::max(top, c[j]);
                }
                for (double& x : c) sum += x = std::exp(x - top);
                for (int m = 0; m < J * D; ++m) out[m] += c[m / D] / sum * y[m];
            }
            for (int j = 0; j < J; ++j) {
                double norm = 0;
                for (int d = 0; d < D; ++d) norm += out[j * D + d] * out[j * D + d];
                const double f = std::sqrt(norm) / (1 + norm);
                for (int d = 0; d < D; ++d) expected[1][(n * J + j) * D + d] = f * out[j * D + d];
            }
        }
    }
    // Relative error of s (which = 0) or v (1) at the samples; counts every NaN.
    double error(int which, long& nan) const {
        std::vector<float> x((size_t)batch * J * D);
        check(cudaMemcpy(x.data(), which ? v : s, x.size() * sizeof(float), cudaMemcpyDeviceToHost));
        for (float y : x) nan += std::isnan(y);
        double difference = 0, norm = 0;
        for (size_t n = 0; n < samples.size(); ++n)
            for (int m = 0; m < J * D; ++m) {
                const double r = expected[which][n * J * D + m], d = x[(size_t)samples[n] * J * D + m] - r;
                difference += d * d, norm += r * r;
            }
        const double error = std::sqrt(difference / norm);
        return std::isfinite(error) ? error : 1e30;
    }
    void launch_sum(int chunks) const {
        const int numbers = batch * J * D / 4;
        sum_parts<<<numbers / 32, 256, 0, stream>>>((float4*)parts, (float4*)s, (float4*)v, numbers, chunks);
    }
};

template <Variant kV>
void arrange(Problem& p) {
    const std::string label = std::string("\"part\":\"arrange\",\"variant\":\"") + kNames[kV] +
                              "\",\"batch\":" + std::to_string(p.batch);
    attempt(label, [&] {
        auto weight = [&](int n) {
            arrange_weight<kV>
                <<<(I * J * 32 + 255) / 256, 256, 0, stream>>>(p.w, p.arranged_w + n % p.sets * p.w_bytes);
        };
        auto input = [&](int n) {
            char* to = p.arranged_u + n % p.sets * p.u_bytes;
            arrange_input<kV><<<(I * p.batch * 2 + 255) / 256, 256, 0, stream>>>(p.u, to, p.batch);
        };
        const double w_us = graph_us(weight), u_us = graph_us(input);  // 20 launches fill every set
        printf("{%s,\"weight_us\":%.2f,\"input_us\":%.2f}\n", label.c_str(), w_us, u_us);
    });
}

template <Variant kV, int kWarps>
void run_pass(Problem& p, double& best, std::string& best_line) {
    auto* kernel = [] {
        if constexpr (kV == kFp32x3)
            return &pass_fp32x3<kWarps>;
        else
            return &pass_products<kV, kWarps>;
    }();
    constexpr int shared = kShared<kV, kWarps>;
    const int rows = p.batch / 16 / kTiles<kV, kWarps>;
    const std::string common = std::string("\"variant\":\"") + kNames[kV] +
                               "\",\"batch\":" + std::to_string(p.batch) +
                               ",\"warps\":" + std::to_string(kWarps);
    attempt("\"part\":\"resources\"," + common, [&] {
        cudaFuncAttributes has;
        int blocks = 0;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        check(cudaFuncGetAttributes(&has, kernel));
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kWarps * 32, shared));
        printf(
            "{\"part\":\"resources\",%s,\"registers\":%d,\"local_bytes\":%zu,\"shared_bytes\":%d,\"blocks_"
            "sm\":%d}\n",
            common.c_str(), has.numRegs, has.localSizeBytes, shared, blocks);
    });
    // A block for each multiprocessor, then two, three, four.
    for (int multiple = 1; multiple <= 4; ++multiple) {
        const int chunks = std::min(I, std::max(1, multiple * processors / rows));
        const std::string line =
            common + ",\"chunks\":" + std::to_string(chunks) + ",\"blocks\":" + std::to_string(chunks * rows);
        attempt("\"part\":\"sketch\"," + line, [&] {
            auto launch = [&](int n) {
                const size_t set = n % p.sets;
                kernel<<<dim3(chunks, rows), kWarps * 32, shared, stream>>>(
                    p.arranged_w + set * p.w_bytes, p.arranged_u + set * p.u_bytes, p.V, p.parts, p.batch);
            };
            check(cudaMemsetAsync(p.parts, 0xFF, sizeof(float) * chunks * p.batch * J * D, stream));
            check(cudaMemsetAsync(p.s, 0xFF, sizeof(float) * p.batch * J * D, stream));
            check(cudaMemsetAsync(p.v, 0xFF, sizeof(float) * p.batch * J * D, stream));
            launch(0), check(cudaGetLastError());
            p.launch_sum(chunks), check(cudaGetLastError());
            check(cudaStreamSynchronize(stream));
            long nan = 0;
            const double error = p.error(0, nan), error_v = p.error(1, nan);
            const bool right = nan == 0 && error <= kBounds[kV] && error_v <= kBounds[kV];
            if (!right) failed = true;
            const double us = graph_us(launch), hot = graph_us([&](int) { launch(0); });
            const double sum = graph_us([&](int) { p.launch_sum(chunks); });
            char text[160];
            snprintf(text, sizeof text,
                     ",\"us\":%.2f,\"hot_us\":%.2f,\"sum_us\":%.2f,\"error\":%.2e,\"error_v\":%.2e", us, hot,
                     sum, error, error_v);
            printf("{\"part\":\"sketch\",%s%s,\"nan\":%ld%s}\n", line.c_str(), text, nan,
                   right ? "" : ",\"failed\":\"error\"");
            if (right && us + sum < best) best = us + sum, best_line = line + text;
        });
    }
}
template <Variant kV, int... kWarps>
void run_variant(Problem& p) {
    double best = 1e30;
    std::string line;
    arrange<kV>(p);
    (run_pass<kV, kWarps>(p, best, line), ...);
    if (best < 1e30) printf("{\"part\":\"best\",%s}\n", line.c_str()), fflush(stdout);
}

template <Operation kOp>
void run_rate(const char* name, double flops, std::vector<int> warp_counts) {
    for (int warps : warp_counts) {
        const std::string label = std::string("\"part\":\"rate\",\"operation\":\"") + name +
                                  "\",\"warps\":" + std::to_string(warps);
        attempt(label, [&] {
            float* sink = allocate<float>(1);
            long long* device = allocate<long long>(processors);
            auto launch = [&](int) {
                rate<kOp><<<processors, warps * 32, 0, stream>>>(0.5f, 0.25f, sink, device);
            };
            const double us = graph_us(launch, 4);
            std::vector<long long> cycles(processors);
            check(cudaMemcpy(cycles.data(), device, processors * sizeof(long long), cudaMemcpyDeviceToHost));
            std::nth_element(cycles.begin(), cycles.begin() + processors / 2, cycles.end());
            const double count = (double)kRounds * kChains * warps, middle = cycles[processors / 2];
            printf("{%s,\"cycles_per_warp_instruction_sm\":%.3f,\"us\":%.2f,\"ghz\":%.3f", label.c_str(),
                   middle / count, us, middle / us / 1e3);
            if (flops > 0) printf(",\"tflops\":%.1f", count * processors * flops / us / 1e6);
            printf("}\n");
            check(cudaFree(sink)), check(cudaFree(device));
        });
    }
}
void run_launch_costs() {
    for (int blocks : {1, 2})
        attempt("\"part\":\"grid_sync\",\"blocks_sm\":" + std::to_string(blocks), [&] {
            double us[2];
            for (int n : {0, 100}) {
                void* arguments[] = {&n};
                us[n > 0] = median_us([&] {
                    check(cudaLaunchCooperativeKernel((const void*)barriers, blocks * processors, 128,
                                                      arguments, 0, stream));
                });
            }
            printf("{\"part\":\"grid_sync\",\"blocks_sm\":%d,\"us\":%.3f,\"launch_us\":%.2f}\n", blocks,
                   (us[1] - us[0]) / 100, us[0]);
        });
    attempt("\"part\":\"empty_kernel\"", [&] {
        auto launch = [](int) { empty<<<1, 32, 0, stream>>>(); };
        const double graph = graph_us(launch, 100), plain = median_us([&] {
                                                        for (int n = 0; n < 100; ++n)
                                                            launch(n), check(cudaGetLastError());
                                                    });
        printf("{\"part\":\"empty_kernel\",\"graph_us\":%.3f,\"stream_us\":%.3f}\n", graph, plain / 100);
    });
}

int main() {
    attempt("\"part\":\"device\"", [] {
        cudaDeviceProp device;
        int clock = 0;
        check(cudaGetDeviceProperties(&device, 0));
        check(cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, 0));
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        processors = device.multiProcessorCount;
        printf("{\"part\":\"device\",\"name\":\"%s\",\"multiprocessors\":%d,\"clock_mhz\":%d}\n", device.name,
               processors, clock / 1000);
    });
    if (failed) return 1;
    for (int batch : {128, 1024})
        attempt("\"part\":\"problem\",\"batch\":" + std::to_string(batch), [&] {
            Problem p(batch, batch == 128 ? 12 : 4);
            run_variant<kTf32, 2, 4, 8>(p);
            run_variant<kBf16, 2, 4, 8>(p);
            run_variant<kFp32x3, 4, 8>(p);
        });
    run_launch_costs();
    run_rate<kFma>("fma", 64, {16, 32});
    run_rate<kMmaTf32>("mma_m16n8k8_tf32", 2048, {4, 8, 16});
    run_rate<kMmaBf16K8>("mma_m16n8k8_bf16", 2048, {4, 8, 16});
    run_rate<kMmaBf16K16>("mma_m16n8k16_bf16", 4096, {4, 8, 16});
    run_rate<kExp2>("ex2", 0, {4, 16});
    run_rate<kShuffle>("shfl", 0, {4, 16});
    return failed ? 1 : 0;
}
