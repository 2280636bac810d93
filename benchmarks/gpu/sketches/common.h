// What the sketches share: sizes, instructions, the order of the inputs, sums of parts, and the timing of
// graphs.
#pragma once
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
constexpr float kLog2e = 1.44269504f;
enum Variant { kTf32, kBf16, kFp32x3 };
constexpr const char* kNames[] = {"tf32", "bf16", "fp32x3"};
constexpr double kBounds[] = {2e-3, 1e-2, 1e-5};

template <Variant kV>
constexpr int kWBytes = J * D * K * (kV == kBf16 ? 2 : 4);  // W of one input capsule
template <Variant kV>
constexpr int kUBytes = 16 * K * (kV == kBf16 ? 2 : 4);  // one input capsule of 16 samples
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
        else  // needs only W itself: pairs of k
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

// ---- sums ----

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
