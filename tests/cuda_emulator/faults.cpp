#include "faults.h"

#include <stdexcept>

#include "cuda/device.h"

namespace emulator {
namespace {

using namespace capsops;

struct Parameters {
    const float* in;
    float* out;
    int n;
    bool correct;
};

// out[i] = in[n - 1 - i] by way of shared memory.
void reverse(Parameters p) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[thread_index()] = p.in[thread_index()];
    if (p.correct) block_barrier();
    p.out[thread_index()] = shared[thread_count() - 1 - thread_index()];
}

// Every block adds what its neighbour has written in the step before.
void neighbours(Parameters p) {
    p.out[block_index()] = p.in[block_index()];
    if (p.correct) grid_barrier();
    const float before = load_bypassing_l1(p.out + (block_index() + block_count() - 1) % block_count());
    grid_barrier();
    if (thread_index() == 0) p.out[block_index()] += before;
}

// The faulty one reads one element too many.
void shift(Parameters p) {
    const int i = thread_index();
    if (i < p.n) p.out[i] = i + 1 < p.n + (p.correct ? 0 : 1) ? p.in[i + 1] : 0.0f;
}

// The faulty one writes one element too many to shared memory.
void shared_overrun(Parameters p) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[thread_index() + (p.correct ? 0 : 1)] = p.in[thread_index()];
    block_barrier();
    p.out[thread_index()] = 1.0f;
}

void store(float* to, const float (&c)[4]) {
    const int g = lane_index() / 4, q = lane_index() % 4;
    to[g * 8 + 2 * q] = c[0], to[g * 8 + 2 * q + 1] = c[1];
    to[(g + 8) * 8 + 2 * q] = c[2], to[(g + 8) * 8 + 2 * q + 1] = c[3];
}

// out [16, 8] = in [16, 8] times its first 8 rows transposed; the faulty one exchanges two fragments.
void product(Parameters p) {
    const int g = lane_index() / 4, q = lane_index() % 4;
    const float a[4] = {p.in[g * 8 + q], p.in[(g + 8) * 8 + q], p.in[g * 8 + q + 4],
                        p.in[(g + 8) * 8 + q + 4]};
    const float b[2] = {p.in[g * 8 + q], p.in[g * 8 + q + 4]};
    const float wrong[4] = {a[0], a[2], a[1], a[3]};
    float c[4] = {0, 0, 0, 0};
    mma_tf32(c, p.correct ? a : wrong, b);
    store(p.out, c);
}

// Of x [16, 16] in 16 bits, by four warps: x times its first 8 rows transposed; the same of its first 8
// columns; x transposed times its first 8 columns. The faulty one exchanges fragments.
template <typename S>
void products_16_bit(Parameters p) {
    S* const x = reinterpret_cast<S*>(shared_memory());
    for (int n = thread_index(); n < 256; n += thread_count()) narrow(p.in[n], x[n]);
    block_barrier();
    const int lane = lane_index();
    const S* const block = x + lane % 16 * 16 + lane / 16 * 8;  // in the order of the registers of a
    uint32_t a[4], b[2];
    load_matrices(a, block);
    load_matrices(b, x + lane % 8 * 16 + lane / 8 % 2 * 8);
    const uint32_t half_a[2] = {a[p.correct ? 0 : 1], a[p.correct ? 1 : 0]}, half_b[1] = {b[0]};
    const uint32_t whole_a[4] = {a[0], a[p.correct ? 1 : 2], a[p.correct ? 2 : 1], a[3]};
    float c[3][4] = {};
    mma_16_bit<S>(c[0], whole_a, b);
    mma_16_bit<S>(c[1], half_a, half_b);
    uint32_t transposed[4], rows[2];
    for (int n = 0; n < 4; ++n) transposed[n] = transpose_pairs(a[p.correct && n % 3 != 0 ? 3 - n : n]);
    load_transposed(rows, x + lane % 16 * 16);
    mma_16_bit<S>(c[2], transposed, rows);
    for (int n = 0; n < 3; ++n) store(p.out + 128 * n, c[n]);
}

// In the faulty one half of the threads leave before the barrier.
void deserted(Parameters p) {
    if (!p.correct && thread_index() % 2 == 0) return;
    block_barrier();
    p.out[thread_index()] = 1.0f;
}

// In the faulty one the odd lanes exchange by another instruction.
void divergent(Parameters p) {
    const float x = p.in[thread_index()];
    p.out[thread_index()] = p.correct || thread_index() % 2 == 0 ? shuffle_xor(x, 1) : shuffle(x, 0);
}

// out = in by way of shared memory, four numbers per thread. The faulty one waits only after it has read.
void late_wait(Parameters p) {
    float* const shared = reinterpret_cast<float*>(shared_memory()) + 4 * thread_index();
    const bool has = 4 * thread_index() < p.n;
    if (has) copy_async(shared, p.in + 4 * thread_index(), true);
    if (p.correct) wait_for_copies();
    for (int e = 0; e < 4 && has; ++e) p.out[4 * thread_index() + e] = shared[e];
    wait_for_copies();
}

// Two copies; the faulty one never waits for the second.
void forgotten_wait(Parameters p) {
    float* const shared = reinterpret_cast<float*>(shared_memory());
    if (thread_index() > 0) return;
    for (int n = 0; n < 2; ++n) {
        copy_async(shared + 4 * n, p.in, true);
        commit_copies();
    }
    wait_for_older_copies(p.correct ? 0 : 1);
    for (int e = 0; e < 4; ++e) p.out[e] = shared[e];
}

// Nine groups of one copy each, the last of which has not ended, and a wait for all but the newest n. out
// shows which copies have arrived then; those that have not are NaN.
void groups(Parameters p) {
    float* const shared = reinterpret_cast<float*>(shared_memory());
    if (thread_index() > 0) return;
    for (int group = 0; group < 9; ++group) {
        copy_async(shared + 4 * group, p.in + 4 * group, group % 2 == 0);
        if (group < 8) commit_copies();
    }
    wait_for_older_copies(p.n);
    for (int group = 0; group < 9; ++group) p.out[group] = shared[4 * group];
    wait_for_copies();
}

struct Named {
    const char* name;
    void (*kernel)(Parameters);
};

constexpr Named kernels[] = {{"reverse", reverse},
                             {"neighbours", neighbours},
                             {"shift", shift},
                             {"product", product},
                             {"products_bfloat16", products_16_bit<Bfloat16>},
                             {"products_float16", products_16_bit<Float16>},
                             {"deserted", deserted},
                             {"divergent", divergent},
                             {"late_wait", late_wait},
                             {"forgotten_wait", forgotten_wait},
                             {"groups", groups},
                             {"shared_overrun", shared_overrun}};

}  // namespace

void run_fault(const std::string& name, uintptr_t in, uintptr_t out, int n, int blocks, int threads,
               bool correct) {
    for (const Named& named : kernels) {
        if (name != named.name) continue;
        const Launch how{named.name, blocks, threads, int64_t(threads * sizeof(float)), nullptr, blocks > 1};
        launch(named.kernel, how,
               Parameters{reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), n, correct});
        return;
    }
    throw std::invalid_argument("no kernel is called " + name);
}

}  // namespace emulator
