// Kernels with one known fault each, and the same kernels without it, for the tests of the emulator.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

// Runs the kernel of that name, with or without its fault. `in` and `out` are addresses of float32; the
// meaning of n depends on the kernel.
void run_fault(const std::string& name, uintptr_t in, uintptr_t out, int n, int blocks, int threads,
               bool correct);

}  // namespace emulator
