// The functions of the emulator that Python calls, besides the settings.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// Allocates memory between two protected pages, filled with NaN, and returns its address: at the end of its
// pages (aligned to 16 bytes) or at their beginning.
uintptr_t allocate(size_t size, bool at_end);

// Frees all allocations; an error if memory next to one of them was overwritten.
void check_and_free();

}  // namespace emulator
