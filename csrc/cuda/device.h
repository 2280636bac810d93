// Everything that the kernels need from the device, one small function each: indices, barriers, exchange
// within a warp, tensor cores, asynchronous copies, and the launch. tests/cuda_emulator has a version that
// runs on a CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/squash_factor.h"

#if defined(CAPSOPS_EMULATED)
#include "emulated_device.h"
#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define CAPSOPS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define CAPSOPS_DEVICE __device__ __forceinline__
#define CAPSOPS_CALLED __device__ __noinline__  // a real call, whose registers do not add to the caller's
#define CAPSOPS_PARAMETER const __grid_constant__

namespace capsops {

CAPSOPS_DEVICE int thread_index() { return threadIdx.x; }
CAPSOPS_DEVICE int thread_count() { return blockDim.x; }
CAPSOPS_DEVICE int64_t block_index() { return blockIdx.x; }
CAPSOPS_DEVICE int64_t block_count() { return gridDim.x; }

// Returns x and hides its value from the compiler, which then cannot compute expressions of x early and keep
// them in registers until they are needed.
CAPSOPS_DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

CAPSOPS_DEVICE float opaque(float x) {
    asm volatile("" : "+f"(x));
    return x;
}

// The dynamic shared memory of the block.
CAPSOPS_DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

CAPSOPS_DEVICE void block_barrier() { __syncthreads(); }
CAPSOPS_DEVICE void warp_barrier() { __syncwarp(); }
CAPSOPS_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

// For the threads of a group of warps; different groups meet at different barriers, 0 to 7.
CAPSOPS_DEVICE void group_barrier(int group, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");
}

// The blocks of a cluster run at the same time and read each other's shared memory. Without clusters every
// block is one.
#if __CUDA_ARCH__ >= 900
CAPSOPS_DEVICE int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
CAPSOPS_DEVICE int cluster_index() {
    int index;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}
CAPSOPS_DEVICE int cluster_count() {
    int count;
    asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
    return count;
}
CAPSOPS_DEVICE void cluster_barrier() {
    __syncwarp();  // the lanes of a warp have to arrive together
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}
// The same address of shared memory in another block of the cluster.
CAPSOPS_DEVICE float4 load_of_cluster(const float4* shared, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(uint32_t(__cvta_generic_to_shared(shared))), "r"(rank));
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
#else
CAPSOPS_DEVICE int cluster_rank() { return 0; }
CAPSOPS_DEVICE int cluster_index() { return int(blockIdx.x); }
CAPSOPS_DEVICE int cluster_count() { return int(gridDim.x); }
CAPSOPS_DEVICE void cluster_barrier() { __syncthreads(); }
CAPSOPS_DEVICE float4 load_of_cluster(const float4* shared, int) { return *shared; }
#endif

CAPSOPS_DEVICE bool any_lane(bool x) { return __any_sync(0xffffffff, x); }
CAPSOPS_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
CAPSOPS_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

CAPSOPS_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffff, x, lane); }
CAPSOPS_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }

// c += a b with a 16 x 8, b 8 x 8, in TF32. With g = lane / 4 and q = lane % 4 a lane holds a (g, q), (g + 8,
// q), (g, q + 4), (g + 8, q + 4); b (q, g), (q + 4, g); c (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
CAPSOPS_DEVICE void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

CAPSOPS_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b, uint32_t next_b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(next_b));
}

// Nearest, ties away from zero. The tensor core itself ignores the last 13 bits.
CAPSOPS_DEVICE float round_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return __uint_as_float(bits);
}

// 2^x to two units in the last place; below 2^-126 it is 0.
CAPSOPS_DEVICE float power_of_2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// 1 / x to one unit in the last place, for x whose reciprocal is neither below 2^-126 nor above 2^126.
CAPSOPS_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Begins to copy 16 bytes to shared memory, or to write 16 zero bytes if not valid. Both addresses are
// aligned to 16 bytes.
CAPSOPS_DEVICE void copy_async(void* shared, const void* global, bool valid) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
        "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
        : "memory");
}

// Waits for all asynchronous copies of this thread. After a barrier the other threads see them too.
CAPSOPS_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Ends a group of copies: those that this thread has begun since the previous group.
CAPSOPS_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread except the `newest` last ones, 1 to 7; for any other number, for all
// copies.
CAPSOPS_DEVICE void wait_for_older_copies(int newest) {
    switch (newest) {
        case 7:
            asm volatile("cp.async.wait_group 7;" ::: "memory");
            return;
        case 6:
            asm volatile("cp.async.wait_group 6;" ::: "memory");
            return;
        case 5:
            asm volatile("cp.async.wait_group 5;" ::: "memory");
            return;
        case 4:
            asm volatile("cp.async.wait_group 4;" ::: "memory");
            return;
        case 3:
            asm volatile("cp.async.wait_group 3;" ::: "memory");
            return;
        case 2:
            asm volatile("cp.async.wait_group 2;" ::: "memory");
            return;
        case 1:
            asm volatile("cp.async.wait_group 1;" ::: "memory");
            return;
        default:
            return wait_for_copies();
    }
}

// Loads a number that another block may have written since the kernel began, bypassing the multiprocessor's
// cache.
CAPSOPS_DEVICE float load_bypassing_l1(const float* x) { return __ldcg(x); }
CAPSOPS_DEVICE float2 load_bypassing_l1(const float2* x) { return __ldcg(x); }
CAPSOPS_DEVICE float4 load_bypassing_l1(const float4* x) { return __ldcg(x); }

// Storage types, and their conversion to and from the float32 that kernels compute in.
typedef __nv_bfloat16 Bfloat16;
typedef __half Float16;
CAPSOPS_DEVICE float widen(float x) { return x; }
CAPSOPS_DEVICE float widen(Bfloat16 x) { return __bfloat162float(x); }
CAPSOPS_DEVICE float widen(Float16 x) { return __half2float(x); }
// Two neighbouring numbers; x is aligned to their total size.
CAPSOPS_DEVICE float2 load_pair(const float* x) { return *reinterpret_cast<const float2*>(x); }
CAPSOPS_DEVICE float2 load_pair(const Bfloat16* x) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x));
}
CAPSOPS_DEVICE float2 load_pair(const Float16* x) {
    return __half22float2(*reinterpret_cast<const __half2*>(x));
}
CAPSOPS_DEVICE void narrow(float x, float& to) { to = x; }
CAPSOPS_DEVICE void narrow(float x, Bfloat16& to) { to = __float2bfloat16_rn(x); }
CAPSOPS_DEVICE void narrow(float x, Float16& to) { to = __float2half_rn(x); }
// Four neighbouring numbers; x is aligned to their total size.
CAPSOPS_DEVICE void load_quad(float (&to)[4], const float* x) {
    const float4 quad = *reinterpret_cast<const float4*>(x);
    to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
}
CAPSOPS_DEVICE void store_pair(float x, float y, float* to) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
CAPSOPS_DEVICE void store_pair(float x, float y, Bfloat16* to) {
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
}
CAPSOPS_DEVICE void store_pair(float x, float y, Float16* to) {
    *reinterpret_cast<__half2*>(to) = __floats2half2_rn(x, y);
}

// Two 16-bit numbers in one register, the first in its lower half.
template <typename S>
CAPSOPS_DEVICE uint32_t pack_pair(float first, float second) {
    uint32_t pair;
    if constexpr (std::is_same<S, Bfloat16>::value) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    }
    return pair;
}
template <typename S>
CAPSOPS_DEVICE float2 widen_pair(uint32_t pair) {
    if constexpr (std::is_same<S, Bfloat16>::value) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    }
}

template <typename S>
CAPSOPS_DEVICE void load_quad(float (&to)[4], const S* x) {
    const uint2 quad = *reinterpret_cast<const uint2*>(x);
    const float2 low = widen_pair<S>(quad.x), high = widen_pair<S>(quad.y);
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

// c += a b with a 16 x 16 and b 16 x 8, of 16-bit numbers. A lane holds pairs of neighbours, named here by
// their first number: of a, along the row, (g, 2q), (g + 8, 2q), (g, 2q + 8), (g + 8, 2q + 8); of b, along
// the column, (2q, g), (2q + 8, g); c as above.
template <typename S>
CAPSOPS_DEVICE void mma_16_bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same<S, Bfloat16>::value) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// The same with a 16 x 8 and b 8 x 8: the first half of the pairs above.
template <typename S>
CAPSOPS_DEVICE void mma_16_bit(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    if constexpr (std::is_same<S, Bfloat16>::value) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    } else {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
}

// Loads matrices of 8 x 8 16-bit numbers from shared memory. Lane 8 m + r passes the address of row r of
// matrix m, aligned to 16 bytes. Each lane receives the pair (g, 2q), (g, 2q + 1) of every matrix.
CAPSOPS_DEVICE void load_matrices(uint32_t (&to)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(uint32_t(__cvta_generic_to_shared(row))));
}
CAPSOPS_DEVICE void load_matrices(uint32_t (&to)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(uint32_t(__cvta_generic_to_shared(row))));
}
CAPSOPS_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row))));
}

// The same, transposed: each lane receives the pair (2q, g), (2q + 1, g) of every matrix.
CAPSOPS_DEVICE void load_transposed(uint32_t (&to)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(uint32_t(__cvta_generic_to_shared(row))));
}
CAPSOPS_DEVICE void load_transposed(uint32_t (&to)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(uint32_t(__cvta_generic_to_shared(row))));
}

// Transposes a matrix of which each lane holds the pair (g, 2q), (g, 2q + 1).
CAPSOPS_DEVICE uint32_t transpose_pairs(uint32_t x) {
    uint32_t transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(x));
    return transposed;
}

}  // namespace capsops
#endif

namespace capsops {

typedef cudaStream_t Stream;

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(status));
    }
}

struct Device {
    int index;
    int multiprocessors;
    int64_t shared_per_block;
    bool cooperative, clusters;
};

inline int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// Makes a device the current one of this thread during the lifetime of the object.
class CurrentDevice {
  public:
    explicit CurrentDevice(int index) : index_(index) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != index) check(cudaSetDevice(index), "cudaSetDevice");
    }
    ~CurrentDevice() {
        if (before_ != index_) cudaSetDevice(before_);
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

    Device limits() const {
        const auto attribute = [this](cudaDeviceAttr name) {
            int value = 0;
            check(cudaDeviceGetAttribute(&value, name, index_), "cudaDeviceGetAttribute");
            return value;
        };
        return {index_, attribute(cudaDevAttrMultiProcessorCount),
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                attribute(cudaDevAttrCooperativeLaunch) != 0, attribute(cudaDevAttrClusterLaunch) != 0};
    }

  private:
    int index_, before_ = 0;
};

// Raises a kernel's limit of shared memory on the current device to at least `shared` bytes. The limit is
// never lowered, since another thread may be about to launch the same kernel with more.
template <typename Parameters>
void allow_shared(void (*kernel)(Parameters), const char* name, int64_t shared) {
    if (shared <= 48 * 1024) return;
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, int64_t> allowed;
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    int64_t& limit = allowed[{device, reinterpret_cast<const void*>(kernel)}];
    if (shared <= limit) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
    limit = shared;
}

// How many blocks can be resident on one multiprocessor at a time; 0 if not even one fits.
template <typename Parameters>
int resident_blocks(void (*kernel)(Parameters), const char* name, int threads, int64_t shared) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int64_t>, int> cache;
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(device, reinterpret_cast<const void*>(kernel), threads, shared);
    const auto entry = cache.find(key);
    if (entry != cache.end()) return entry->second;
    allow_shared(kernel, name, shared);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, size_t(shared)), name);
    return cache[key] = blocks;
}

struct Launch {
    const char* name;
    int64_t blocks;
    int threads;
    int64_t shared;
    Stream stream;
    bool cooperative = false;  // all blocks run at the same time and can use grid_barrier()
    int cluster = 1;           // blocks of a cluster
};

// The configuration of a launch, with the attributes that it points to.
class LaunchConfig {
  public:
    explicit LaunchConfig(const Launch& from) {
        config_.gridDim = dim3(unsigned(from.blocks));
        config_.blockDim = dim3(unsigned(from.threads));
        config_.dynamicSmemBytes = size_t(from.shared);
        config_.stream = from.stream;
        config_.attrs = attributes_;
        if (from.cooperative) {
            attributes_[config_.numAttrs].id = cudaLaunchAttributeCooperative;
            attributes_[config_.numAttrs++].val.cooperative = 1;
        }
        if (from.cluster > 1) {
            attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attributes_[config_.numAttrs++].val.clusterDim = {unsigned(from.cluster), 1, 1};
        }
    }
    LaunchConfig(const LaunchConfig&) = delete;
    LaunchConfig& operator=(const LaunchConfig&) = delete;
    const cudaLaunchConfig_t* get() const { return &config_; }

  private:
    cudaLaunchConfig_t config_{};
    cudaLaunchAttribute attributes_[2]{};
};

// How many clusters of blocks can be resident on the device at a time; 0 if not even one fits.
template <typename Parameters>
int resident_clusters(void (*kernel)(Parameters), const Launch& config) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int64_t, int>, int> cache;
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    const void* const function = reinterpret_cast<const void*>(kernel);
    const auto key = std::make_tuple(device, function, config.threads, config.shared, config.cluster);
    const auto entry = cache.find(key);
    if (entry != cache.end()) return entry->second;
    allow_shared(kernel, config.name, config.shared);
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, function, LaunchConfig(config).get()), config.name);
    return cache[key] = clusters;
}

template <typename Parameters>
void launch(void (*kernel)(Parameters), const Launch& config, Parameters parameters) {
    allow_shared(kernel, config.name, config.shared);
    void* arguments[] = {&parameters};
    check(cudaLaunchKernelExC(LaunchConfig(config).get(), reinterpret_cast<const void*>(kernel), arguments),
          config.name);
}

}  // namespace capsops
#endif

#if defined(__CUDACC__) || defined(CAPSOPS_EMULATED)
namespace capsops {

constexpr int warp_size = 32;

CAPSOPS_DEVICE int lane_index() { return thread_index() % warp_size; }
CAPSOPS_DEVICE int warp_index() { return thread_index() / warp_size; }
CAPSOPS_DEVICE int warp_count() { return thread_count() / warp_size; }

// Number `at` of an array of storage type S.
template <typename S>
CAPSOPS_DEVICE float load(const void* x, int64_t at) {
    return widen(static_cast<const S*>(x)[at]);
}

// Sum over the lanes whose indices differ only in the bits of (span - 1) * step. All of them receive it.
CAPSOPS_DEVICE float lane_sum(float x, int span = warp_size, int step = 1) {
    for (int mask = step; mask < span * step; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

CAPSOPS_DEVICE float lane_max(float x, int span = warp_size, int step = 1) {
    for (int mask = step; mask < span * step; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

}  // namespace capsops
#endif
