// Threads, shares of work and workspace.
//
// Threads come from OpenMP. On Linux the calls bind to the runtime that torch has loaded before: no second
// pool. A team has as many threads as torch uses or one, since a change of size makes the runtime build its
// team anew.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>

#include "common/arena.h"
#include "simd.h"

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

typedef AlignedArena<64> Arena;  // aligned to cache lines

// A buffer aligned to a cache line; `base` is null if the memory could not be allocated.
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
