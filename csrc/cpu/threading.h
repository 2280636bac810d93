// Threads, the division of work among them, and workspace.
//
// Threads come from OpenMP. On Linux the calls bind to the OpenMP runtime that torch has already loaded, so
// there is no second pool. A team has either one thread or as many as torch uses: when the size of a team
// changes, the runtime has to build a new one.
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

    // This thread's share of n items: [begin, end).
    CAPSOPS_INLINE int64_t begin(int64_t n) const { return n * rank / size; }
    CAPSOPS_INLINE int64_t end(int64_t n) const { return n * (rank + 1) / size; }

    void barrier() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

constexpr Team single_thread{0, 1};

// Runs work(team) on every thread of a team.
template <typename Work>
inline void run_team(int threads, const Work& work) {
    if (threads <= 1) {
        work(single_thread);
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
