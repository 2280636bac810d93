// Checks of the arguments that come from Python, where every tensor is an address with its length in bytes.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

namespace capsops {

// Address and bytes of a contiguous tensor; (0, 0) for one that is missing.
typedef std::pair<uintptr_t, int64_t> Memory;

constexpr int64_t max_iterations = 1000;

// `takes` completes the message: what the argument may be.
inline void require(bool fits, const char* name, int64_t got, const char* takes) {
    if (!fits)
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(got) + ", takes " + takes);
}

// Bytes of a tensor; an error if a size is not positive or the product does not fit in 64 bits.
inline int64_t bytes_of(const char* name, std::initializer_list<int64_t> sizes, int64_t element) {
    int64_t bytes = element;
    for (int64_t size : sizes) {
        if (size >= 1 && !__builtin_mul_overflow(bytes, size, &bytes)) continue;
        std::string got;
        for (int64_t each : sizes) got += (got.empty() ? "" : ", ") + std::to_string(each);
        throw std::invalid_argument(std::string(name) + ": got sizes [" + got +
                                    "], takes positive ones whose bytes are a 64-bit number");
    }
    return bytes;
}

// The address of a tensor, which must have exactly these sizes.
inline void* pointer(const char* name, const Memory& memory, std::initializer_list<int64_t> sizes,
                     int64_t element) {
    const int64_t bytes = bytes_of(name, sizes, element);
    if (memory.first == 0 || memory.second != bytes) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(memory.second) +
                                    " bytes at address " + std::to_string(memory.first) + ", takes " +
                                    std::to_string(bytes) + " bytes");
    }
    return reinterpret_cast<void*>(memory.first);
}

// The same for a tensor that may be missing; null if it is.
inline void* optional_pointer(const char* name, const Memory& memory, std::initializer_list<int64_t> sizes,
                              int64_t element) {
    if (memory.first == 0 && memory.second == 0) return nullptr;
    return pointer(name, memory, sizes, element);
}

inline void require_tensor(const char* name, const void* tensor) {
    if (!tensor) throw std::invalid_argument(std::string(name) + ": got none, takes one");
}

}  // namespace capsops
