// What the bindings check of a call: every tensor comes from Python as an address with its length in bytes.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

namespace capsops {

// Address and bytes of a contiguous tensor; (0, 0) for a tensor that is not there.
typedef std::pair<uintptr_t, int64_t> Memory;

constexpr int64_t max_iterations = 1000;
constexpr int max_threads = 4096;

inline void require(bool fits, const char* name, int64_t got, const char* takes) {
    if (!fits)
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(got) + ", takes " + takes);
}

// Bytes of a tensor, refused where a size is not positive or the product is no 64-bit number.
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

// The address of a tensor that has exactly these sizes.
template <typename T = void>
T* pointer(const char* name, const Memory& memory, std::initializer_list<int64_t> sizes, int64_t element) {
    const int64_t bytes = bytes_of(name, sizes, element);
    if (memory.first == 0 || memory.second != bytes) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(memory.second) +
                                    " bytes at address " + std::to_string(memory.first) + ", takes " +
                                    std::to_string(bytes) + " bytes");
    }
    return reinterpret_cast<T*>(memory.first);
}

// The same of a tensor that may be missing: null then.
template <typename T = void>
T* optional_pointer(const char* name, const Memory& memory, std::initializer_list<int64_t> sizes,
                    int64_t element) {
    if (memory.first == 0 && memory.second == 0) return nullptr;
    return pointer<T>(name, memory, sizes, element);
}

}  // namespace capsops
