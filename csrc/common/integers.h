// Arithmetic of sizes and counts.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace capsops {

CAPSOPS_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CAPSOPS_HOST_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

CAPSOPS_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
CAPSOPS_HOST_DEVICE int64_t round_up(int64_t a, int64_t unit) { return divide_up(a, unit) * unit; }

}  // namespace capsops
