// Divides a workspace among the arrays that share it.
#pragma once

#include <cstdint>

#include "common/integers.h"

namespace capsops {

// Hands out arrays from a block of memory, each aligned to `alignment` bytes if the block is. Without a block
// it only counts the bytes: the same code first measures the workspace and then divides it.
template <int64_t alignment>
class AlignedArena {
  public:
    CAPSOPS_HOST_DEVICE explicit AlignedArena(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

    template <typename T>
    CAPSOPS_HOST_DEVICE T* take(int64_t count) {
        T* const array = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
        used_ += round_up(count * int64_t(sizeof(T)), alignment);
        return array;
    }

    CAPSOPS_HOST_DEVICE int64_t used() const { return used_; }

  private:
    char* memory_;
    int64_t used_ = 0;
};

}  // namespace capsops
