// The version of csrc/cuda/device.h that runs the kernels on a CPU, with a fiber for each thread.
//
// Emulated: the threads of a block, or in a cooperative launch of all blocks, in a forward or a backward
// order, one warp at a time as far as it can run; barriers of warp, group, block, cluster and grid; exchange
// within a warp; shared memory of the blocks of a cluster; the tensor core with its fragment layout and
// rounding; dynamic shared memory, poisoned with NaN; asynchronous copies, executed either when they begin or
// when they are waited for, which are the earliest and the latest moment at which hardware may execute them.
// Errors: a barrier that some threads never reach, lanes of a warp that meet in different instructions, a
// thread that ends before it has waited for its copies, and an access outside an allocation.
//
// Not emulated: the PTX itself, memory fences and caches, warps that run truly in parallel, the tensor core's
// order of summation, limits on registers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define CAPSOPS_KERNEL(threads, blocks) void
#define CAPSOPS_DEVICE inline
#define CAPSOPS_CALLED inline
#define CAPSOPS_PARAMETER const

namespace emulator {

int thread_index();
int thread_count();
int64_t block_index();
int64_t block_count();
char* shared_memory();
void block_barrier();
void group_barrier(int group, int threads);
void grid_barrier();
int cluster_rank();
int cluster_index();
int cluster_count();
void cluster_barrier();
// The same address of shared memory in another block of the cluster.
const void* of_cluster(const void* shared, int rank);

// Every lane of the warp passes `size` bytes and receives those of all lanes, `slot_size` bytes apart.
const char* exchange(const char* instruction, const void* mine, int size);

void check_alignment(const void* address, size_t bytes);

// Asynchronous copies of 16 bytes (of zeros if not valid) and their groups, as cp.async, commit_group and
// wait_group of PTX.
void begin_copy(void* shared, const void* global, bool valid);
void end_group();
void wait_for_groups(int64_t newest);

void run(const char* name, int64_t blocks, int threads, int64_t shared, bool cooperative, int cluster,
         const std::function<void()>& kernel);

struct Settings {
    int multiprocessors = 3;
    int64_t shared_per_block = 227 * 1024;
    bool cooperative = true;
    bool clusters = true;
    bool backwards = false;  // the order of the fibers, and of the blocks of a launch that is not cooperative
    bool late_copies = false;  // copies are executed when they are waited for, else when they begin
};
extern Settings settings;

constexpr int slot_size = 32;  // bytes that one lane can pass in an exchange

}  // namespace emulator

namespace capsops {

typedef const void* Stream;

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int opaque(int x) { return x; }
inline float opaque(float x) { return x; }

using emulator::block_barrier;
using emulator::block_count;
using emulator::block_index;
using emulator::cluster_barrier;
using emulator::cluster_count;
using emulator::cluster_index;
using emulator::cluster_rank;
using emulator::grid_barrier;
using emulator::group_barrier;
using emulator::shared_memory;
using emulator::thread_count;
using emulator::thread_index;

inline void warp_barrier() { emulator::exchange("warp_barrier", nullptr, 0); }

inline float lane_value(const char* slots, int lane, int at = 0) {
    float x;
    std::memcpy(&x, slots + lane * emulator::slot_size + at * int(sizeof(float)), sizeof(float));
    return x;
}

inline float shuffle(float x, int lane) {
    return lane_value(emulator::exchange("shuffle", &x, sizeof x), lane & 31);
}

inline float shuffle_xor(float x, int mask) {
    return lane_value(emulator::exchange("shuffle_xor", &x, sizeof x),
                      (emulator::thread_index() ^ mask) & 31);
}

inline float4 load_of_cluster(const float4* shared, int rank) {
    emulator::check_alignment(shared, 16);
    return *static_cast<const float4*>(emulator::of_cluster(shared, rank));
}

inline bool any_lane(bool x) {
    const char* slots = emulator::exchange("any_lane", &x, sizeof x);
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= slots[lane * emulator::slot_size] != 0;
    return any;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float truncate_tf32(float x) { return float_of(bits_of(x) & 0xffffe000); }

inline float round_tf32(float x) {
    const uint32_t bits = bits_of(x);
    return (bits & 0x7f800000) == 0x7f800000 ? x : float_of((bits + 0x1000) & 0xffffe000);
}

inline void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    const float mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const char* slots = emulator::exchange("mma_tf32", mine, sizeof mine);
    const int g = emulator::thread_index() % 32 / 4, q = emulator::thread_index() % 4;
    for (int e = 0; e < 4; ++e) {
        const int column = 2 * q + e % 2;
        double sum = c[e];
        for (int k = 0; k < 8; ++k) {
            const float left = lane_value(slots, 4 * g + k % 4, e / 2 + 2 * (k / 4));
            const float right = lane_value(slots, 4 * column + k % 4, 4 + k / 4);
            sum += double(truncate_tf32(left)) * truncate_tf32(right);
        }
        c[e] = float(sum);
    }
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b, uint32_t next_b) {
    mma_tf32(c, {float_of(a[0]), float_of(a[1]), float_of(a[2]), float_of(a[3])},
             {float_of(b), float_of(next_b)});
}

// ---- 16 bits: pairs of numbers in one register, the first in its lower half

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    _Float16 value;
};
inline float widen(float x) { return x; }
inline float widen(Bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) { return float(x.value); }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, Bfloat16& to) {
    const uint32_t bits = bits_of(x);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to.bits = uint16_t(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Float16& to) { to.value = _Float16(x); }

template <typename S>
uint32_t pack_pair(float first, float second) {
    S pair[2];
    narrow(first, pair[0]), narrow(second, pair[1]);
    uint32_t packed;
    std::memcpy(&packed, pair, 4);
    return packed;
}
template <typename S>
float2 widen_pair(uint32_t packed) {
    S pair[2];
    std::memcpy(pair, &packed, 4);
    return {widen(pair[0]), widen(pair[1])};
}

// One half of register `at` of a lane.
template <typename S>
float half_value(const char* slots, int lane, int at, int half) {
    S x;
    std::memcpy(&x, slots + lane * emulator::slot_size + at * 4 + half * 2, 2);
    return widen(x);
}

template <typename S, int depth>
void mma_of_pairs(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    constexpr int halves = depth / 8;
    uint32_t mine[3 * halves];
    std::memcpy(mine, a, 8 * halves), std::memcpy(mine + 2 * halves, b, 4 * halves);
    const char* slots = emulator::exchange("mma_16_bit", mine, sizeof mine);
    const int g = emulator::thread_index() % 32 / 4, q = emulator::thread_index() % 4;
    for (int e = 0; e < 4; ++e) {
        const int column = 2 * q + e % 2;
        double sum = c[e];
        for (int k = 0; k < depth; ++k) {
            const float left = half_value<S>(slots, 4 * g + k % 8 / 2, e / 2 + 2 * (k / 8), k % 2);
            const float right = half_value<S>(slots, 4 * column + k % 8 / 2, 2 * halves + k / 8, k % 2);
            sum += double(left) * right;
        }
        c[e] = float(sum);
    }
}

template <typename S>
void mma_16_bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_of_pairs<S, 16>(c, a, b);
}
template <typename S>
void mma_16_bit(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    mma_of_pairs<S, 8>(c, a, b);
}

// Two neighbours in row (or, transposed, in column) g of a matrix, the addresses of whose rows are in 8
// lanes.
inline uint32_t matrix_pair(const char* slots, int matrix, bool transposed) {
    const int g = emulator::thread_index() % 32 / 4, q = emulator::thread_index() % 4;
    uint32_t pair = 0;
    for (int half = 0; half < 2; ++half) {
        const int row = transposed ? 2 * q + half : g, column = transposed ? g : 2 * q + half;
        const uint16_t* address;
        std::memcpy(&address, slots + (8 * matrix + row) * emulator::slot_size, sizeof address);
        pair |= uint32_t(address[column]) << 16 * half;
    }
    return pair;
}

template <int count>
void load_matrices(uint32_t (&to)[count], const void* row) {
    emulator::check_alignment(row, 16);
    const char* slots = emulator::exchange("load_matrices", &row, sizeof row);
    for (int matrix = 0; matrix < count; ++matrix) to[matrix] = matrix_pair(slots, matrix, false);
}

template <int count>
void load_transposed(uint32_t (&to)[count], const void* row) {
    emulator::check_alignment(row, 16);
    const char* slots = emulator::exchange("load_transposed", &row, sizeof row);
    for (int matrix = 0; matrix < count; ++matrix) to[matrix] = matrix_pair(slots, matrix, true);
}

inline uint32_t transpose_pairs(uint32_t x) {
    const char* slots = emulator::exchange("transpose_pairs", &x, sizeof x);
    const int g = emulator::thread_index() % 32 / 4, q = emulator::thread_index() % 4;
    uint32_t pair = 0;
    for (int half = 0; half < 2; ++half) {
        uint16_t number;
        std::memcpy(&number, slots + (4 * (2 * q + half) + g / 2) * emulator::slot_size + g % 2 * 2, 2);
        pair |= uint32_t(number) << 16 * half;
    }
    return pair;
}

inline float power_of_2(float x) {
    const float power = exp2f(x);
    return power < 1.17549435e-38f ? 0.0f : power;
}

inline float reciprocal(float x) { return 1.0f / x; }

inline void copy_async(void* shared, const void* global, bool valid) {
    emulator::check_alignment(shared, 16);
    emulator::check_alignment(global, 16);
    emulator::begin_copy(shared, global, valid);
}
inline void commit_copies() { emulator::end_group(); }
// PTX defines wait_all as these two.
inline void wait_for_copies() {
    emulator::end_group();
    emulator::wait_for_groups(0);
}
inline void wait_for_older_copies(int newest) {
    if (newest >= 1 && newest <= 7) {
        emulator::wait_for_groups(newest);
    } else {
        wait_for_copies();
    }
}

inline float load_bypassing_l1(const float* x) { return *x; }
inline float2 load_bypassing_l1(const float2* x) { return *x; }
inline float4 load_bypassing_l1(const float4* x) { return *x; }

template <typename S>
inline float2 load_pair(const S* x) {
    emulator::check_alignment(x, 2 * sizeof(S));
    return {widen(x[0]), widen(x[1])};
}
template <typename S>
inline void load_quad(float (&to)[4], const S* x) {
    emulator::check_alignment(x, 4 * sizeof(S));
    for (int n = 0; n < 4; ++n) to[n] = widen(x[n]);
}
template <typename S>
inline void store_pair(float x, float y, S* to) {
    emulator::check_alignment(to, 2 * sizeof(S));
    narrow(x, to[0]), narrow(y, to[1]);
}
struct Device {
    int index;
    int multiprocessors;
    int64_t shared_per_block;
    bool cooperative, clusters;
};

inline int device_count() { return 1; }
class CurrentDevice {
  public:
    explicit CurrentDevice(int index) : index_(index) {}
    Device limits() const {
        return {index_, emulator::settings.multiprocessors, emulator::settings.shared_per_block,
                emulator::settings.cooperative, emulator::settings.clusters};
    }

  private:
    int index_;
};

template <typename Parameters>
int resident_blocks(void (*)(Parameters), const char*, int, int64_t shared) {
    return shared > emulator::settings.shared_per_block ? 0 : 1;
}

struct Launch {
    const char* name;
    int64_t blocks;
    int threads;
    int64_t shared;
    Stream stream;
    bool cooperative = false;
    int cluster = 1;
};

template <typename Parameters>
int resident_clusters(void (*)(Parameters), const Launch& config) {
    const emulator::Settings& settings = emulator::settings;
    if (config.shared > settings.shared_per_block || (config.cluster > 1 && !settings.clusters)) return 0;
    return settings.multiprocessors / config.cluster;
}

template <typename Parameters>
void launch(void (*kernel)(Parameters), const Launch& config, Parameters parameters) {
    emulator::run(config.name, config.blocks, config.threads, config.shared, config.cooperative,
                  config.cluster, [kernel, parameters] { kernel(parameters); });
}

}  // namespace capsops
