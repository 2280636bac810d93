// What the kernels of routing share: the parameters, and the steps after the sums over i.
//
// Pass t = 0 ... T - 1 of the forward direction: s = sum_i c_ij u_hat_ij + bias, v = squash(s), V' = V + v,
// with c = softmax_j(u_hat_ij . V_j). The sums over i are partial sums, one per split of i, which are
// added in the order of the splits. Backward, pass t = T - 1 ... 1: dV += sum_i db_ij u_hat_ij, ds of pass t
// - 1 = squash-vjp(s, dV), with a = u_hat . ds and db = c (a - sum_j c a).
#pragma once

#include "kernels.h"
#include "softmax.h"
#include "squash.h"

namespace capsops {

constexpr float log2_e = 1.44269504f;

// V and ds of each pass in the layout of the passes' registers (operands.h): [T, tiles of 16 samples,
// tiles_j, tiles, 32, 4], with 0 where there is nothing.
struct Arranged {
    float* v;
    float* grad_s;    // backward only
    int64_t numbers;  // of each
    int n, tile_j, tiles, tiles_j, tiles_b;

    // Where a number of [B, J, D] is.
    CAPSOPS_HOST_DEVICE int64_t at(int t, int64_t b, int64_t j, int64_t d) const {
        const int own_j = int(j % tile_j), group = own_j / 4, left = tiles - 4 * n * group;
        const int size = left < 4 * n ? left / n : 4;  // of the group
        const int width = 8 / size, part = int(d % width);
        const int lane = int(b % 8) * 4 + own_j % 4 * (4 / size) + part / 2;
        const int tile = 4 * n * group + int(d) / width;
        const int64_t item = (int64_t(t) * tiles_b + b / 16) * tiles_j + j / tile_j;
        return ((item * tiles + tile) * 32 + lane) * 4 + b % 16 / 8 * 2 + part % 2;
    }
};

struct Routing {
    const void* u;  // [B, I, K], or u_hat [B, I, J, D] where weight is null
    const void* weight;
    const void* bias;
    void* v;
    float* s;
    void* couplings;
    const void* grad;
    void* grad_u;
    void* grad_weight;
    void* grad_bias;
    int64_t B, I, J, D, K;
    int iterations;  // T, at least 1
    float first;     // the coupling of the first pass: 1 / J, 1 / (J + 1) with leaky, 1 without routing
    bool leaky, detach;

    // Workspace, float32.
    float* total_v;       // V of each pass [T, B, J, D], the first 0
    float* grad_s;        // ds of each pass [T, B, J, D], backward only
    float* grad_total_v;  // dV [B, J, D], backward only
    float* partial;       // [splits, B, J, D]
    Softmax* softmax;     // [T - 1, I, B]: all passes but the first backward, else that of the current pass;
                          // null if the kernels only need it within a block
    int64_t splits;
    Arranged arranged;  // null pointers if the passes do not take them

    // The current pass.
    int t;
    bool backward;

    CAPSOPS_HOST_DEVICE int64_t capsules() const { return B * J * D; }
    CAPSOPS_HOST_DEVICE int64_t softmax_at(int pass, int64_t b, int64_t i) const {
        return ((backward ? pass - 1 : 0) * I + i) * B + b;
    }
};

// Divides `count` items among all warps of the grid: calls function(n) for those of this warp.
template <typename Function>
CAPSOPS_DEVICE void for_warps(int64_t count, Function function) {
    const int64_t warps = block_count() * warp_count();
    for (int64_t n = block_index() * warp_count() + warp_index(); n < count; n += warps) function(n);
}

// How the lanes of a warp share an output capsule: `dims` lanes along d, the rest along the splits.
struct CapsuleLanes {
    int dims, d, split, splits;

    CAPSOPS_DEVICE explicit CapsuleLanes(int64_t D) : dims(1) {
        while (dims < warp_size && dims < D) dims *= 2;
        d = lane_index() % dims, split = lane_index() / dims, splits = warp_size / dims;
    }
};

// The sum of the partial sums at `at`, in a fixed order; all lanes of the warp call it.
CAPSOPS_DEVICE float sum_of_splits(const Routing& p, const CapsuleLanes& lanes, int64_t at, bool valid) {
    float sum = 0.0f;
    if (valid) {
#pragma unroll 4
        for (int64_t n = lanes.split; n < p.splits; n += lanes.splits) {
            sum += load_bypassing_l1(p.partial + n * p.capsules() + at);
        }
    }
    return lane_sum(sum, lanes.splits, lanes.dims);
}

// Squash of the vector with components x(d), which the lanes along d share.
template <typename Function>
CAPSOPS_DEVICE Squash squash_of(int64_t D, const CapsuleLanes& lanes, Function x) {
    float largest = 0.0f, square = 0.0f;
    for (int64_t d = lanes.d; d < D; d += lanes.dims) largest = fmaxf(largest, fabsf(x(d)));
    const float scale = length_scale(lane_max(largest, lanes.dims));
    for (int64_t d = lanes.d; d < D; d += lanes.dims) square += (x(d) / scale) * (x(d) / scale);
    return Squash(scale, lane_sum(square, lanes.dims));
}

// Computes ds of pass t from dv, whose components are grad_v(d).
template <typename Function>
CAPSOPS_DEVICE void backward_through_squash(const Routing& p, const CapsuleLanes& lanes, int t,
                                            int64_t capsule, Function grad_v) {
    const float* const s = p.s + t * p.capsules() + capsule * p.D;
    float* const grad_s = p.grad_s + t * p.capsules() + capsule * p.D;
    const Squash f = squash_of(p.D, lanes, [s](int64_t d) { return s[d]; });
    float along = 0.0f;
    for (int64_t d = lanes.d; d < p.D; d += lanes.dims) along += f.direction(s[d]) * grad_v(d);
    along = lane_sum(along, lanes.dims);
    if (lanes.split > 0) return;
    for (int64_t d = lanes.d; d < p.D; d += lanes.dims) {
        const float grad = f.vjp(s[d], grad_v(d), along);
        grad_s[d] = grad;
        if (p.arranged.grad_s) p.arranged.grad_s[p.arranged.at(t, capsule / p.J, capsule % p.J, d)] = grad;
    }
}

// Forward, after the sums of pass t: s, then V of the next pass or, after the last, v.
template <typename S>
CAPSOPS_CALLED void finish_forward(const Routing& p, int t) {
    const CapsuleLanes lanes(p.D);
    for_warps(p.B * p.J, [&](int64_t capsule) {
        const int64_t at = capsule * p.D, j = capsule % p.J;
        float* const s = p.s + t * p.capsules() + at;
        for (int64_t base = 0; base < p.D; base += lanes.dims) {
            const int64_t d = base + lanes.d;
            float sum = sum_of_splits(p, lanes, at + d, d < p.D);
            if (d < p.D && p.bias != nullptr) sum += load<S>(p.bias, j * p.D + d);
            if (d < p.D && lanes.split == 0) s[d] = sum;
        }
        warp_barrier();
        const Squash f = squash_of(p.D, lanes, [s](int64_t d) { return load_bypassing_l1(s + d); });
        if (lanes.split > 0) return;
        const bool last = t + 1 == p.iterations;
        for (int64_t d = lanes.d; d < p.D; d += lanes.dims) {
            const float v = f.value(load_bypassing_l1(s + d));
            if (p.v != nullptr && last) {
                narrow(v, static_cast<S*>(p.v)[at + d]);
            } else {
                const float* const before = p.total_v + t * p.capsules() + at + d;
                float* const after = p.total_v + (t + 1) * p.capsules() + at + d;
                const float total = (t == 0 ? 0.0f : load_bypassing_l1(before)) + v;
                *after = total;
                if (p.arranged.v) p.arranged.v[p.arranged.at(t + 1, capsule / p.J, j, d)] = total;
            }
        }
    });
}

// Backward, before the first pass: V of all passes, and ds of the last.
template <typename S>
CAPSOPS_CALLED void begin_backward(const Routing& p) {
    const CapsuleLanes lanes(p.D);
    for_warps(p.B * p.J, [&](int64_t capsule) {
        const int64_t at = capsule * p.D;
        for (int t = 0; t + 1 < p.iterations; ++t) {
            const float* const s = p.s + t * p.capsules() + at;
            const Squash f = squash_of(p.D, lanes, [s](int64_t d) { return s[d]; });
            for (int64_t d = lanes.d; d < p.D && lanes.split == 0; d += lanes.dims) {
                const float before = t == 0 ? 0.0f : p.total_v[t * p.capsules() + at + d];
                const float total = before + f.value(s[d]);
                p.total_v[(t + 1) * p.capsules() + at + d] = total;
                if (p.arranged.v) p.arranged.v[p.arranged.at(t + 1, capsule / p.J, capsule % p.J, d)] = total;
            }
        }
        backward_through_squash(p, lanes, p.iterations - 1, capsule,
                                [&](int64_t d) { return load<S>(p.grad, at + d); });
    });
}

// Backward, after the sums of pass t: dV, and from it ds of pass t - 1.
static CAPSOPS_CALLED void finish_backward(const Routing& p, int t) {
    const CapsuleLanes lanes(p.D);
    for_warps(p.B * p.J, [&](int64_t capsule) {
        const int64_t at = capsule * p.D;
        for (int64_t base = 0; base < p.D; base += lanes.dims) {
            const int64_t d = base + lanes.d;
            float sum = sum_of_splits(p, lanes, at + d, d < p.D);
            if (d >= p.D || lanes.split > 0) continue;
            if (t + 1 < p.iterations) sum += load_bypassing_l1(p.grad_total_v + at + d);
            p.grad_total_v[at + d] = sum;
        }
        warp_barrier();
        backward_through_squash(p, lanes, t - 1, capsule,
                                [&](int64_t d) { return load_bypassing_l1(p.grad_total_v + at + d); });
    });
}

}  // namespace capsops
