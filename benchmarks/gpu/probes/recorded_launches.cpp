// Calls routing on a machine without a GPU and prints the launches that it makes. The functions of the CUDA
// runtime that the host code uses are replaced by those below, which describe an H100 or H200.
//
//     recorded_launches KERNELS forward|backward float32|tf32|bfloat16|float16 B I J D K T COOPERATIVE
//
// COOPERATIVE is 1 as on a GPU, or 0 to make each step a launch of its own, which can be looked at by itself.
//
// KERNELS has a line for each kernel: its name, its registers, the bytes of shared memory that it declares and
// those of its parameters. A launch becomes a line: name, blocks, threads, dynamic shared memory, blocks of a
// cluster, blocks resident on a multiprocessor, and the parameters in hexadecimal.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>

#include "cuda/kernels.h"

namespace {

struct Kernel {
    int registers = 0, shared = 0, parameters = 0;
};

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}

std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> names;
    return names;
}

// As in benchmarks/gpu/occupancy.py.
int resident(const Kernel& kernel, int threads, size_t shared) {
    const int warps = (threads + 31) / 32, of_warp = (kernel.registers * 32 + 255) / 256 * 256;
    const int by_registers = 4 * (16384 / of_warp < 16 ? 16384 / of_warp : 16) / warps;
    const int by_shared = int((228 * 1024) / (shared + size_t(kernel.shared)));
    const int blocks = by_registers < by_shared ? by_registers : by_shared;
    return blocks < 32 ? blocks : 32;
}

cudaError_t record(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                   unsigned cluster) {
    const std::string& name = names()[function];
    const Kernel& kernel = kernels()[name];
    std::printf("%s %u %u %zu %u %d ", name.c_str(), grid.x, block.x, shared, cluster,
                resident(kernel, int(block.x), shared));
    const unsigned char* bytes = static_cast<const unsigned char*>(arguments[0]);
    for (int n = 0; n < kernel.parameters; ++n) std::printf("%02x", bytes[n]);
    std::printf("\n");
    return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t CUDARTAPI cudaSetDevice(int) { return cudaSuccess; }
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount               ? 132
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin    ? 227 * 1024
             : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 * 1024
             : attribute == cudaDevAttrComputeCapabilityMajor          ? 9
             : attribute == cudaDevAttrComputeCapabilityMinor          ? 0
                                                                       : 1;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                                    int threads, size_t shared) {
    *blocks = resident(kernels()[names()[function]], threads, shared);
    return cudaSuccess;
}
cudaError_t CUDARTAPI cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                             int threads, size_t shared,
                                                                             unsigned) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

cudaError_t CUDARTAPI cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                                     const cudaLaunchConfig_t* config) {
    const int blocks = resident(kernels()[names()[function]], int(config->blockDim.x), config->dynamicSmemBytes);
    int size = 1;
    for (unsigned n = 0; n < config->numAttrs; ++n) {
        if (config->attrs[n].id == cudaLaunchAttributeClusterDimension)
            size = int(config->attrs[n].val.clusterDim.x);
    }
    *clusters = 132 * blocks / size;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t CUDARTAPI cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                       size_t shared, cudaStream_t) {
    return record(function, grid, block, arguments, shared, 1);
}
cudaError_t CUDARTAPI cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                                  void** arguments, size_t shared, cudaStream_t) {
    return record(function, grid, block, arguments, shared, 1);
}
cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                          void** arguments) {
    unsigned cluster = 1;
    for (unsigned n = 0; n < config->numAttrs; ++n) {
        if (config->attrs[n].id == cudaLaunchAttributeClusterDimension)
            cluster = config->attrs[n].val.clusterDim.x;
    }
    return record(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, cluster);
}

// What nvcc generates calls these.
void** CUDARTAPI __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void CUDARTAPI __cudaRegisterFatBinaryEnd(void**) {}
void CUDARTAPI __cudaUnregisterFatBinary(void**) {}
void CUDARTAPI __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void CUDARTAPI __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                                      uint3*, dim3*, dim3*, int*) {
    names()[function] = name;
}
cudaError_t CUDARTAPI __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t CUDARTAPI __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
    return cudaErrorNotSupported;  // a launch by <<< >>>, which capsops does not use
}
unsigned CUDARTAPI __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t CUDARTAPI __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }

}  // extern "C"

int main(int count, char** arguments) {
    if (count != 11) return std::fprintf(stderr, "takes 10 arguments\n"), 2;
    std::ifstream file(arguments[1]);
    for (std::string name; file >> name;) {
        Kernel& kernel = kernels()[name];
        file >> kernel.registers >> kernel.shared >> kernel.parameters;
    }
    const std::string op = arguments[2], precision = arguments[3];
    // Addresses that no one reads: far apart, and aligned as torch aligns them.
    uintptr_t next = uintptr_t(1) << 40;
    const auto tensor = [&next] { return reinterpret_cast<void*>(next += uintptr_t(1) << 32); };
    capsops::RoutingCall call{};
    call.dtype = precision == "bfloat16"  ? capsops::Dtype::bfloat16
                 : precision == "float16" ? capsops::Dtype::float16
                                          : capsops::Dtype::float32;
    call.u_hat_dtype = call.dtype;
    call.B = std::atoi(arguments[4]), call.I = std::atoi(arguments[5]), call.J = std::atoi(arguments[6]);
    call.D = std::atoi(arguments[7]), call.K = std::atoi(arguments[8]);
    call.iterations = std::atoi(arguments[9]);
    call.squash_output = true;
    call.u = tensor(), call.weight = tensor(), call.s = tensor();
    const bool backward = op == "backward";
    if (backward) {
        call.grad = tensor(), call.grad_u = tensor(), call.grad_weight = tensor(), call.grad_bias = tensor();
    } else {
        call.v = tensor(), call.bias = tensor();
    }
    const capsops::Device device = capsops::CurrentDevice(0).limits();
    const capsops::RoutingMode mode{precision == "tf32", std::atoi(arguments[10]) != 0};
    capsops::routing(backward ? capsops::RoutingOp::backward : capsops::RoutingOp::forward, call, mode, tensor(),
                     device, nullptr);
    return 0;
}
