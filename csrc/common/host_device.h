// Marks a function that host and device code both call, inlined everywhere.
#pragma once

#if defined(__CUDACC__)
#define CAPSOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CAPSOPS_HOST_DEVICE inline __attribute__((always_inline))
#endif
