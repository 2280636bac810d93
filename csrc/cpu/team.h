// Threads, shares of work and workspace.
//
// Threads come from OpenMP. On Linux the calls bind to the runtime that torch has loaded before: no second
// pool. A team has as many threads as torch uses or one, since a change of size makes the runtime build its
// team anew.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>

#include "vec.h"

namespace capsops {
namespace CAPSOPS_ISA {

struct Team {
    int rank, size;

    // Share of n items: [begin, end).
    CAPSOPS_INLINE int64_t begin(int64_t n) const { return n * rank / size; }
    CAPSOPS_INLINE int64_t end(int64_t n) const { return n * (rank + 1) / size; }

    void barrier() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

template <typename Work>
inline void run_team(int threads, const Work& work) {
    if (threads <= 1) {
        work(Team{0, 1});
        return;
    }
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads()});
}

CAPSOPS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CAPSOPS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
CAPSOPS_INLINE int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Hands out pieces of a buffer, each aligned to a cache line; without a buffer it only counts.
struct Pieces {
    char* base = nullptr;
    int64_t used = 0;

    template <typename T>
    T* take(int64_t n) {
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += rounded_up(n * int64_t(sizeof(T)), 64);
        return piece;
    }
};

// A buffer of bytes aligned to a cache line; base is null where the memory is not to be had.
struct Buffer {
    void* raw;
    char* base;

    explicit Buffer(int64_t bytes) : raw(std::malloc(size_t(bytes) + 64)) {
        base =
            raw ? reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + 63) & ~uintptr_t(63)) : nullptr;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(raw); }
};

}  // namespace CAPSOPS_ISA
}  // namespace capsops
