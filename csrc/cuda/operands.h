// The operands of the prediction products, u_hat = W u, and the products.
//
// A warp multiplies 16 samples of u by W of a tile of output capsules. The rows of W are in an order in which
// a lane receives whole output capsules: of its sample all components, or a half or a quarter of them. So the
// dot product with V needs few exchanges between lanes, or none, and its coupling is where it is used.
//
// Both operands are arranged once, in the order in which lanes load them, rounded, and padded with 0.
#pragma once

#include "device.h"
#include "plan.h"

namespace capsops {

// 16 samples x 8 rows of W: 4 numbers in each lane. With g = lane / 4 and q = lane % 4, those of rows 2q and
// 2q + 1, for sample g and for sample g + 8.
typedef float Tile[4];

// The output capsules of a warp, in groups of 4, then of 2 or 1. A group of G has N G tiles: row c of tile m
// is component m (8 / G) + c % (8 / G) of the group's output capsule c / (8 / G). N = D / 8, rounded up.
template <int N, bool few = false>
struct Groups {
    static constexpr int n = N, capsules = capsules_of_warp(N, few), count = (capsules + 3) / 4;
    static CAPSOPS_DEVICE constexpr int size(int group) {
        return 4 * group + 4 <= capsules ? 4 : capsules - 4 * group;
    }
    static constexpr int tiles = N * capsules;
    static constexpr int units = tiles / 4;  // of 4 tiles, all of one group

    // Where number `pair` (of a sample, 0 or 1) of a lane is: the output capsule, and its component.
    struct Position {
        int j, d;
    };
    static CAPSOPS_DEVICE Position position(int tile, int lane) { return row_position(tile, lane % 4 * 2); }
    static CAPSOPS_DEVICE Position row_position(int tile, int row) {
        const int group = tile / (4 * N), m = tile % (4 * N), G = size(group);
        const int bits = G == 4 ? 1 : G == 2 ? 2 : 3;  // of the rows of an output capsule, 8 / G
        return {4 * group + (row >> bits), (m << bits) + (row & ((1 << bits) - 1))};
    }
};

struct alignas(16) Quad {
    uint32_t x[4];
};
struct alignas(8) Pair {
    uint32_t x[2];
};

// A way to multiply has
//   depth    components k in a step
//   u_words  32-bit words of a lane, for 16 samples in a step
//   w_quads  16-byte quads of a lane, for 4 tiles in a step, which arrange_w() computes `w_parts` at a time
//   arrange_u(u, word)            word of the left operand; u(row, k) are its numbers
//   arrange_w(w, part, quads)     quads of the right operand; w(tile, row, k) are its numbers
//   left(u)                       the left operand from the words of a lane
//   multiply(out, left, w)        out += the product of 16 samples and 4 tiles; w are the quads of a lane, 32
//                                 apart

// float32 rounded to TF32.
struct Tf32Products {
    typedef float S;
    static constexpr int depth = 8, u_words = 4, w_quads = 2, w_parts = 1;
    static constexpr bool exact = false;

    template <typename U>
    static CAPSOPS_DEVICE uint32_t arrange_u(U u, int word) {
        const int g = lane_index() / 4, q = lane_index() % 4;
        return bits_of(round_tf32(u(g + word % 2 * 8, q + word / 2 * 4)));
    }
    template <typename W>
    static CAPSOPS_DEVICE void arrange_w(W w, int part, Quad (&quads)[1]) {
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            quads[0].x[r] = bits_of(round_tf32(w(2 * part + r / 2, g, q + r % 2 * 4)));
        }
    }

    typedef Quad Left;
    static CAPSOPS_DEVICE Left left(const uint32_t* u) { return *reinterpret_cast<const Quad*>(u); }
    static CAPSOPS_DEVICE void multiply(Tile* out, const Left& left, const Quad* w) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const Quad x = w[n * warp_size];
            mma_tf32(out[2 * n], left.x, x.x[0], x.x[1]);
            mma_tf32(out[2 * n + 1], left.x, x.x[2], x.x[3]);
        }
    }
};

// float32 by three products in TF32, of the rounded numbers and of what rounding leaves. What is omitted is
// below 2^-22 of a product. A product that overflows, or an operand that is infinite, may give NaN where
// float32 gives an infinity: the kernels compute what is not finite again (plain_prediction).
struct Float32Products {
    typedef float S;
    static constexpr int depth = 8, u_words = 4, w_quads = 4, w_parts = 2;
    static constexpr bool exact = true;

    struct Left {
        uint32_t high[4], low[4];
    };

    template <typename U>
    static CAPSOPS_DEVICE uint32_t arrange_u(U u, int word) {
        const int g = lane_index() / 4, q = lane_index() % 4;
        return bits_of(u(g + word % 2 * 8, q + word / 2 * 4));
    }
    template <typename W>
    static CAPSOPS_DEVICE void arrange_w(W w, int part, Quad (&quads)[2]) {
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float x = w(2 * part + r / 2, g, q + r % 2 * 4), high = round_tf32(x);
            quads[0].x[r] = bits_of(high), quads[1].x[r] = bits_of(round_tf32(x - high));
        }
    }

    static CAPSOPS_DEVICE Left left(const uint32_t* u) {
        const Quad x = *reinterpret_cast<const Quad*>(u);
        Left to;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            // Rounds to nearest, but for NaN, which stays in the difference.
            to.high[r] = (x.x[r] + 0x1000) & 0xffffe000;
            to.low[r] = bits_of(round_tf32(float_of(x.x[r]) - float_of(to.high[r])));
        }
        return to;
    }
    static CAPSOPS_DEVICE void multiply(Tile* out, const Left& left, const Quad* w) {
        const Quad high = w[0], next_high = w[2 * warp_size];
        product(out, left.low, high);
        product(out + 2, left.low, next_high);
        const Quad low = w[warp_size], next_low = w[3 * warp_size];
        product(out, left.high, high);
        product(out + 2, left.high, next_high);
        product(out, left.high, low);
        product(out + 2, left.high, next_low);
    }
    static CAPSOPS_DEVICE void product(Tile* out, const uint32_t (&left)[4], const Quad& w) {
        mma_tf32(out[0], left, w.x[0], w.x[1]);
        mma_tf32(out[1], left, w.x[2], w.x[3]);
    }
};

// 16-bit numbers, whose products are exact.
template <typename Number>
struct SixteenBitProducts {
    typedef Number S;
    static constexpr int depth = 16, u_words = 4, w_quads = 2, w_parts = 1;
    static constexpr bool exact = false;

    template <typename U>
    static CAPSOPS_DEVICE uint32_t arrange_u(U u, int word) {
        const int row = lane_index() / 4 + word % 2 * 8, k = lane_index() % 4 * 2 + word / 2 * 8;
        return pack_pair<S>(u(row, k), u(row, k + 1));
    }
    template <typename W>
    static CAPSOPS_DEVICE void arrange_w(W w, int part, Quad (&quads)[1]) {
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int tile = 2 * part + r / 2, k = 2 * q + r % 2 * 8;
            quads[0].x[r] = pack_pair<S>(w(tile, g, k), w(tile, g, k + 1));
        }
    }

    typedef Quad Left;
    static CAPSOPS_DEVICE Left left(const uint32_t* u) { return *reinterpret_cast<const Quad*>(u); }
    static CAPSOPS_DEVICE void multiply(Tile* out, const Left& left, const Quad* w) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const Quad x = w[n * warp_size];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const uint32_t right[2] = {x.x[2 * m], x.x[2 * m + 1]};
                mma_16_bit<S>(out[2 * n + m], left.x, right);
            }
        }
    }
};

// The same for K of at most 8.
template <typename Number>
struct ShallowSixteenBitProducts {
    typedef Number S;
    static constexpr int depth = 8, u_words = 2, w_quads = 1, w_parts = 1;
    static constexpr bool exact = false;

    template <typename U>
    static CAPSOPS_DEVICE uint32_t arrange_u(U u, int word) {
        const int row = lane_index() / 4 + word * 8, k = lane_index() % 4 * 2;
        return pack_pair<S>(u(row, k), u(row, k + 1));
    }
    template <typename W>
    static CAPSOPS_DEVICE void arrange_w(W w, int, Quad (&quads)[1]) {
        const int g = lane_index() / 4, k = lane_index() % 4 * 2;
#pragma unroll
        for (int r = 0; r < 4; ++r) quads[0].x[r] = pack_pair<S>(w(r, g, k), w(r, g, k + 1));
    }

    typedef Pair Left;
    static CAPSOPS_DEVICE Left left(const uint32_t* u) { return *reinterpret_cast<const Pair*>(u); }
    static CAPSOPS_DEVICE void multiply(Tile* out, const Left& left, const Quad* w) {
        const Quad x = *w;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const uint32_t right[1] = {x.x[m]};
            mma_16_bit<S>(out[m], left.x, right);
        }
    }
};

}  // namespace capsops
