// Transposes blocks of numbers, between samples in rows and samples in lanes.
#pragma once

#include "simd.h"

namespace capsops {
namespace CAPSOPS_ISA {

// dst[c, r] = src[r, c] for a block of rows × columns.
template <typename T>
CAPSOPS_NOINLINE inline void transpose_block(const T* src, int64_t src_stride, int64_t rows, int64_t columns,
                                             T* dst, int64_t dst_stride) {
    constexpr int width = vec_width<T>;
    const int64_t whole_rows = rows / width * width, whole_columns = columns / width * width;
    for (int64_t r = 0; r < whole_rows; r += width) {
        for (int64_t c = 0; c < whole_columns; c += width) {
            Vec<T> square[width];
#pragma GCC unroll 16
            for (int n = 0; n < width; ++n) square[n] = load<T>(src + (r + n) * src_stride + c);
            transpose<width>(square);
#pragma GCC unroll 16
            for (int n = 0; n < width; ++n) store<T>(dst + (c + n) * dst_stride + r, square[n]);
        }
        for (int64_t c = whole_columns; c < columns; ++c) {
            for (int n = 0; n < width; ++n) dst[c * dst_stride + r + n] = src[(r + n) * src_stride + c];
        }
    }
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = whole_rows; r < rows; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
    }
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
