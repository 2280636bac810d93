// Kernels with a known fault each, and their sound twins, for the tests of the emulator.
#pragma once

#include <pybind11/pybind11.h>

namespace emulator {

void define_faults(pybind11::module_& m);

}  // namespace emulator
