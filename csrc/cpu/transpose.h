// Transposes blocks of numbers, between samples in rows and samples in lanes.
#pragma once

#include "simd.h"

namespace capsops {
namespace CAPSOPS_ISA {

// dst[c, r] = src[r, c] for a block of rows × columns, in squares of `width` numbers, and what is left over
// in smaller ones.
template <typename T, int width>
inline void transpose_squares(const T* src, int64_t src_stride, int64_t rows, int64_t columns, T* dst,
                              int64_t dst_stride) {
    const int64_t whole_rows = rows / width * width, whole_columns = columns / width * width;
    for (int64_t r = 0; r < whole_rows; r += width) {
        for (int64_t c = 0; c < whole_columns; c += width) {
            Vec<T, width> square[width];
#pragma GCC unroll 16
            for (int n = 0; n < width; ++n) square[n] = load<T, width>(src + (r + n) * src_stride + c);
            transpose<width>(square);
#pragma GCC unroll 16
            for (int n = 0; n < width; ++n) store<T, width>(dst + (c + n) * dst_stride + r, square[n]);
        }
    }
    if constexpr (width >= 4) {
        const int64_t right = columns - whole_columns, below = rows - whole_rows;
        transpose_squares<T, width / 2>(src + whole_columns, src_stride, whole_rows, right,
                                        dst + whole_columns * dst_stride, dst_stride);
        transpose_squares<T, width / 2>(src + whole_rows * src_stride, src_stride, below, columns,
                                        dst + whole_rows, dst_stride);
    } else {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
                dst[c * dst_stride + r] = src[r * src_stride + c];
        }
    }
}

template <typename T>
CAPSOPS_NOINLINE inline void transpose_block(const T* src, int64_t src_stride, int64_t rows, int64_t columns,
                                             T* dst, int64_t dst_stride) {
    transpose_squares<T, vec_width<T>>(src, src_stride, rows, columns, dst, dst_stride);
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
