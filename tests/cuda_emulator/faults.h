// Kernels with a known fault each, and their sound twins, for the tests of the emulator.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

// Runs the kernel of that name, sound or not, from `in` to `out`, both addresses of float32; what n is, the
// kernel says.
void run_fault(const std::string& name, uintptr_t in, uintptr_t out, int n, int blocks, int threads,
               bool sound);

}  // namespace emulator
