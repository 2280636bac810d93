// The emulator: fibers, barriers, copies and guarded memory.
#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulated_device.h"

namespace emulator {

Settings settings;

namespace {

// ---- guarded memory: every allocation is between two protected pages.

struct Allocation {
    char* pages;
    size_t pages_size;
    char* begin;
    size_t size;
};

constexpr unsigned char poison = 0xff;  // as a number of any type: NaN

Allocation guarded(size_t size, bool at_end) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t inner = (size + page - 1) / page * page;
    void* pages = mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    char* first = static_cast<char*>(pages) + page;
    if (inner > 0 && mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    std::memset(first, poison, inner);
    return {static_cast<char*>(pages), inner + 2 * page, first + (at_end ? (inner - size) / 16 * 16 : 0),
            size};
}

void release(const Allocation& allocation) { munmap(allocation.pages, allocation.pages_size); }

// Up to 15 bytes after an allocation, and all bytes before one, may be on its own pages. Reads of them give
// NaN; here it is checked that they were not overwritten.
bool overrun(const Allocation& allocation) {
    const char* end = allocation.begin + allocation.size;
    const char* limit = allocation.pages + allocation.pages_size - size_t(sysconf(_SC_PAGESIZE));
    for (const char* at = end; at < limit; ++at) {
        if (static_cast<unsigned char>(*at) != poison) return true;
    }
    for (const char* at = allocation.pages + size_t(sysconf(_SC_PAGESIZE)); at < allocation.begin; ++at) {
        if (static_cast<unsigned char>(*at) != poison) return true;
    }
    return false;
}

std::vector<Allocation> allocations;

// ---- fibers

struct Warp {
    int arrived = 0;
    const char* instruction = nullptr;
    alignas(16) char slots[2][32 * slot_size];
};

struct Barrier {
    int64_t arrived = 0;
};

struct Block;

struct Cluster {
    Barrier barrier;
    std::vector<Block*> blocks;
};

struct Block {
    int64_t index;
    Allocation shared;
    std::vector<Warp> warps;
    Barrier barrier;
    Barrier group_barriers[8];
    Cluster* cluster;
};

// A copy that a thread has begun and, with late_copies, not yet executed.
struct Copy {
    void* shared;
    const void* global;
    bool valid;
    int64_t group;
};

void execute(const Copy& copy) {
    if (copy.valid) {
        std::memcpy(copy.shared, copy.global, 16);
    } else {
        std::memset(copy.shared, 0, 16);
    }
}

constexpr size_t stack_size = 128 * 1024;

struct Fiber {
    char* stack;
    ucontext_t first;
    jmp_buf state;
    bool started = false;
    Block* block;
    int thread;
    bool done;
    const int64_t* counter;  // waits until this has reached `goal`
    int64_t goal;
    const int* lanes;
    int lanes_goal;
    std::vector<Copy> copies;
    int64_t groups;  // of copies that have ended
};

std::vector<std::unique_ptr<Fiber>> pool;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* kernel_now;
int threads_now;
int64_t blocks_now;
Barrier grid;
std::string failure;

void leave() {
    if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
}

void fail(const std::string& what) {
    if (failure.empty()) failure = what;
    _longjmp(scheduler, 1);
}

void fiber_main() {
    for (;;) {
        (*kernel_now)();
        if (!current->copies.empty()) fail("a thread ends before it has waited for its copies");
        current->done = true;
        leave();
    }
}

void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.state, 1);
        fiber.started = true;
        setcontext(&fiber.first);
    }
    current = nullptr;
}

Fiber& fiber_of_pool(size_t n) {
    while (pool.size() <= n) {
        auto fiber = std::make_unique<Fiber>();
        void* stack = mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) throw std::bad_alloc();
        fiber->stack = static_cast<char*>(stack);
        getcontext(&fiber->first);
        fiber->first.uc_stack.ss_sp = stack;
        fiber->first.uc_stack.ss_size = stack_size;
        fiber->first.uc_link = nullptr;
        makecontext(&fiber->first, fiber_main, 0);
        pool.push_back(std::move(fiber));
    }
    return *pool[n];
}

void drop_pool() {
    for (auto& fiber : pool) munmap(fiber->stack, stack_size);
    pool.clear();
}

bool ready(const Fiber& fiber) {
    if (fiber.done) return false;
    if (fiber.counter != nullptr) return *fiber.counter >= fiber.goal;
    return fiber.lanes == nullptr || *fiber.lanes >= fiber.lanes_goal;
}

void run_blocks(std::vector<std::unique_ptr<Block>>& blocks, const char* name) {
    std::vector<Fiber*> fibers;
    grid.arrived = 0;
    for (auto& block : blocks) {
        for (int thread = 0; thread < threads_now; ++thread) {
            Fiber& fiber = fiber_of_pool(fibers.size());
            fiber.block = block.get(), fiber.thread = thread, fiber.done = false;
            fiber.counter = nullptr, fiber.lanes = nullptr, fiber.groups = 0;
            fibers.push_back(&fiber);
        }
    }
    const auto in_order = [](size_t n, size_t count) { return settings.backwards ? count - 1 - n : n; };
    const size_t warps = fibers.size() / 32;
    for (size_t left = fibers.size(); left > 0;) {
        bool moved = false;
        for (size_t n = 0; n < warps; ++n) {
            // A warp runs ahead of the others as far as it can.
            for (bool again = true; again && failure.empty();) {
                again = false;
                for (size_t lane = 0; lane < 32 && failure.empty(); ++lane) {
                    Fiber& fiber = *fibers[32 * in_order(n, warps) + in_order(lane, 32)];
                    if (!ready(fiber)) continue;
                    resume(fiber);
                    left -= fiber.done;
                    again = moved = true;
                }
            }
        }
        if (!moved) failure = "threads wait at a barrier that the others never reach";
        if (!failure.empty()) {
            drop_pool();
            throw std::runtime_error(std::string(name) + ": " + std::exchange(failure, ""));
        }
    }
}

void on_fault(int, siginfo_t* info, void*) {
    if (current == nullptr) {
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    failure = "access outside an allocation, by thread " + std::to_string(current->thread) + " of block " +
              std::to_string(current->block->index) + " (address " +
              std::to_string(reinterpret_cast<uintptr_t>(info->si_addr)) + ")";
    _longjmp(scheduler, 1);
}

// Turns faults inside of kernels into errors during the lifetime of the object.
class FaultHandler {
  public:
    FaultHandler() : stack_(64 * 1024) {
        stack_t alternative{};
        alternative.ss_sp = stack_.data();
        alternative.ss_size = stack_.size();
        sigaltstack(&alternative, &stack_before_);
        struct sigaction action{};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &action_before_);
    }
    ~FaultHandler() {
        sigaction(SIGSEGV, &action_before_, nullptr);
        sigaltstack(&stack_before_, nullptr);
    }

  private:
    std::vector<char> stack_;
    stack_t stack_before_;
    struct sigaction action_before_;
};

}  // namespace

int thread_index() { return current->thread; }
int thread_count() { return threads_now; }
int64_t block_index() { return current->block->index; }
int64_t block_count() { return blocks_now; }
char* shared_memory() { return current->block->shared.begin; }

static void meet(Barrier& barrier, int64_t threads) {
    current->goal = barrier.arrived++ / threads * threads + threads;
    current->counter = &barrier.arrived;
    leave();
    current->counter = nullptr;
}

void block_barrier() { meet(current->block->barrier, threads_now); }
void group_barrier(int group, int threads) {
    if (group < 0 || group > 7 || threads % 32 != 0) fail("a barrier of a group that does not exist");
    meet(current->block->group_barriers[group], threads);
}
int cluster_rank() { return int(current->block->index % int64_t(current->block->cluster->blocks.size())); }
int cluster_index() { return int(current->block->index / int64_t(current->block->cluster->blocks.size())); }
int cluster_count() { return int(blocks_now / int64_t(current->block->cluster->blocks.size())); }
void cluster_barrier() {
    Cluster& cluster = *current->block->cluster;
    meet(cluster.barrier, threads_now * int64_t(cluster.blocks.size()));
}
const void* of_cluster(const void* shared, int rank) {
    const Block& own = *current->block;
    const auto offset = static_cast<const char*>(shared) - own.shared.begin;
    if (offset < 0 || size_t(offset) >= own.shared.size || rank < 0 ||
        size_t(rank) >= own.cluster->blocks.size())
        fail("an address that is not in the shared memory of a cluster");
    return own.cluster->blocks[size_t(rank)]->shared.begin + offset;
}
void grid_barrier() { meet(grid, threads_now * blocks_now); }

const char* exchange(const char* instruction, const void* mine, int size) {
    Warp& warp = current->block->warps[current->thread / 32];
    if (warp.arrived % 32 == 0) warp.instruction = instruction;
    if (warp.instruction != instruction && std::strcmp(warp.instruction, instruction) != 0) {
        fail(std::string("lanes of one warp meet in ") + warp.instruction + " and in " + instruction);
    }
    char* slots = warp.slots[warp.arrived / 32 % 2];
    if (size > 0) std::memcpy(slots + current->thread % 32 * slot_size, mine, size);
    current->lanes_goal = warp.arrived++ / 32 * 32 + 32;
    current->lanes = &warp.arrived;
    leave();
    current->lanes = nullptr;
    return slots;
}

void check_alignment(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        fail("an address is not aligned to " + std::to_string(bytes) + " bytes");
    }
}

void begin_copy(void* shared, const void* global, bool valid) {
    const Copy copy{shared, global, valid, current->groups};
    if (settings.late_copies) {
        current->copies.push_back(copy);
    } else {
        execute(copy);
    }
}

void end_group() { ++current->groups; }

void wait_for_groups(int64_t newest) {
    std::vector<Copy>& copies = current->copies;
    auto next = copies.begin();
    for (; next != copies.end() && next->group < current->groups - newest; ++next) execute(*next);
    copies.erase(copies.begin(), next);
}

void run(const char* name, int64_t blocks, int threads, int64_t shared, bool cooperative, int cluster,
         const std::function<void()>& kernel) {
    if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024 || threads % 32 != 0 ||
        shared > settings.shared_per_block) {
        throw std::runtime_error(std::string(name) + ": cannot launch " + std::to_string(blocks) +
                                 " blocks of " + std::to_string(threads) + " threads with " +
                                 std::to_string(shared) + " bytes of shared memory");
    }
    if (cooperative && (!settings.cooperative || blocks > settings.multiprocessors)) {
        throw std::runtime_error(std::string(name) + ": too many blocks for a cooperative launch");
    }
    if (blocks % cluster != 0 || (cluster > 1 && (!settings.clusters || cluster > settings.multiprocessors)))
        throw std::runtime_error(std::string(name) + ": no clusters of " + std::to_string(cluster));
    const FaultHandler handler;
    kernel_now = &kernel, threads_now = threads, blocks_now = blocks;
    const auto make_block = [&](int64_t index) {
        auto block = std::make_unique<Block>();
        block->index = index;
        block->shared = guarded(size_t(shared), true);
        block->warps.resize(size_t(threads / 32));
        return block;
    };
    std::vector<std::unique_ptr<Block>> running;
    std::vector<std::unique_ptr<Cluster>> clusters;
    const auto finish = [&] {
        bool over = false;
        for (auto& block : running) over |= overrun(block->shared), release(block->shared);
        running.clear();
        clusters.clear();
        if (over) throw std::runtime_error(std::string(name) + ": wrote outside its shared memory");
    };
    const int64_t count = blocks / cluster;
    for (int64_t n = 0; n < count; ++n) {
        const int64_t at = settings.backwards && !cooperative ? count - 1 - n : n;
        clusters.push_back(std::make_unique<Cluster>());
        for (int64_t rank = 0; rank < cluster; ++rank) {
            running.push_back(make_block(at * cluster + rank));
            running.back()->cluster = clusters.back().get();
            clusters.back()->blocks.push_back(running.back().get());
        }
        if (cooperative && n + 1 < count) continue;
        run_blocks(running, name);
        finish();
    }
}

uintptr_t allocate(size_t size, bool at_end) {
    allocations.push_back(guarded(size, at_end));
    return reinterpret_cast<uintptr_t>(allocations.back().begin);
}

void check_and_free() {
    bool over = false;
    for (const Allocation& allocation : allocations) over |= overrun(allocation), release(allocation);
    allocations.clear();
    if (over) throw std::runtime_error("wrote outside an allocation");
}

}  // namespace emulator
