// A routing pass after the first, for J = 10, D = 16, K = 8, in three precisions, and the rates that bound
// it. Prints one JSON object a line.
//   nvcc -O3 -std=c++17 -arch=sm_90 benchmarks/gpu/sketches/forward_pass.cu -o forward_pass && ./forward_pass
//
// A warp holds 16 samples. In TF32 and bfloat16 both steps of the pass are matrix products only with W_ij:
//   logit_ij = sum_k u_ik (sum_d V_jd W_ijdk)     V is the A operand (in registers), u multiplies the result;
//   s_jd    += sum_k (c_ij u_ik) W_ijdk           c u is the A operand, s the accumulator.
// float32 forms u_hat once, from three TF32 products, and holds it; there two warps share the output
// capsules.
#include "common.h"

constexpr int kStep = 2, kStages = 4;  // input capsules a stage, stages of the ring in shared memory
template <Variant kV, int kWarps>
constexpr int kTiles = kV == kFp32x3 ? kWarps / 2 : kWarps;  // tiles of 16 samples in a block
template <Variant kV, int kWarps>
constexpr int kShared = kStages * kStep * (kWBytes<kV> + kTiles<kV, kWarps> * kUBytes<kV>);
template <Variant kV, int kWarps>
constexpr int kMinBlocks = kWarps >= 8 ? 1 : (kV == kTf32 ? 8 : 12) / kWarps;

// ---- what the passes share ----

// A barrier of two warps. Constant numbers: a variable one would reserve all 16 barriers for each block.
__device__ __forceinline__ void pair_barrier(int pair) {
    if (pair == 0) asm volatile("bar.sync 1, 64;" ::: "memory");
    if (pair == 1) asm volatile("bar.sync 2, 64;" ::: "memory");
    if (pair == 2) asm volatile("bar.sync 3, 64;" ::: "memory");
    if (pair == 3) asm volatile("bar.sync 4, 64;" ::: "memory");
}
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
            // mma drops the low bits of c u: on average 0.72 / 2^11 of it, added back here.
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
