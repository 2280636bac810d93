// What the emulator offers to Python, beside the settings.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// Address of memory between pages that cannot be touched, filled with NaN: at the end of its pages (aligned
// to 16), or at their beginning.
uintptr_t allocate(size_t size, bool at_end);

// Frees all allocations; an error if something beside one of them was overwritten.
void check_and_free();

}  // namespace emulator
