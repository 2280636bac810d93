// The forward pass of dynamic_routing: one block for each sample, all iterations without a barrier of the
// grid.
//
// A warp has some sets of input capsules, `lanes / parts` of them in each, for all output capsules; `parts`
// lanes share a vector, 4 components in each. So the logits, softmax and sums of a set stay within the warp,
// and V and the sums within its registers. The sets pass through a ring of slots in shared memory, forwards
// in the first iteration, backwards in the second and so on: the sets that are in the ring at the end of one
// iteration are the first ones of the next, and only the rest is read again. Sums over the warps are made
// once per iteration.
#include "smem_cached.h"

namespace capsops {
namespace {

// `exact`: J is max_j, else it may be less.
template <typename S, int parts, int max_j, bool exact>
struct Sample {
    static constexpr bool tensor_cores = smem_cached_on_tensor_cores(int(sizeof(S)), parts);
    static constexpr int set_size = tensor_cores ? 16 : warp_size / parts;  // input capsules
    static constexpr int size = 4 * parts;  // of a vector; components beyond D are 0

    const SmemCached& cached;
    const Routing& p;
    const SmemCachedTiling& tiling;
    const int64_t b;
    const int J, D, lane, part;
    const int own_sets;     // how many sets this warp has: warp_index() + n warp_count()
    S* const slots;         // of this warp [slots, set_size, row]
    float* const sums;      // [warps, J, size]
    float* const total_v;   // [J, size]
    float* const weighted;  // [J, size]: s

    CAPSOPS_DEVICE Sample(const SmemCached& cached, int64_t b)
        : cached(cached),
          p(cached.p),
          tiling(cached.tiling),
          b(b),
          J(exact ? max_j : int(p.J)),
          D(int(p.D)),
          lane(lane_index()),
          part(lane % parts),
          own_sets((tiling.sets - warp_index() + warp_count() - 1) / warp_count()),
          slots(reinterpret_cast<S*>(shared_memory()) + warp_index() * tiling.slots * set_size * tiling.row),
          sums(reinterpret_cast<float*>(shared_memory() + tiling.ring)),
          total_v(sums + warp_count() * J * size),
          weighted(total_v + J * size) {}

    // The components beyond D, which no copy writes, must be 0.
    CAPSOPS_DEVICE void clear() const {
        if (D == size) return;
        float* const words = reinterpret_cast<float*>(shared_memory());
        for (int n = thread_index(); n < int(tiling.shared / 4); n += thread_count()) words[n] = 0.0f;
        block_barrier();
    }

    // Begins to copy set n of this warp, if it exists, to its slot, n modulo the number of slots.
    CAPSOPS_DEVICE void copy(int n, S* to) const {
        if (n >= 0 && n < own_sets) {
            const int i = (warp_index() + n * warp_count()) * set_size, left = int(p.I) - i;
            const S* const from = static_cast<const S*>(p.u) + (b * p.I + i) * (J * D);
            if (cached.vectors && D == size) {
                constexpr int copy_width = 16 / int(sizeof(S));
                const int per_row = J * size / copy_width;
#pragma unroll 1
                for (int m = lane; m < set_size * per_row; m += warp_size) {
                    const int chunk_i = m / per_row, at = m % per_row * copy_width;
                    const bool valid = chunk_i < left;
                    copy_async(to + chunk_i * tiling.row + at, from + (valid ? m * copy_width : 0), valid);
                }
            } else {
                const int per_row = J * D;
#pragma unroll 1
                for (int m = lane; m < set_size * per_row; m += warp_size) {
                    const int chunk_i = m / per_row, at = m % per_row;
                    S zero{};
                    to[chunk_i * tiling.row + at / D * size + at % D] = chunk_i < left ? from[m] : zero;
                }
            }
        }
        commit_copies();
    }

    // The component that is number e of a lane's 4.
    CAPSOPS_DEVICE int component(int e) const {
        return tensor_cores ? 2 * part + e % 2 + 8 * (e / 2) : 4 * part + e;
    }

    // Calls work(set in shared memory) for all sets of this warp and copies further sets meanwhile.
    template <typename Work>
    CAPSOPS_DEVICE void for_sets(bool forwards, Work work) const {
        int slot = forwards ? 0 : (own_sets + tiling.slots - 1) % tiling.slots;
#pragma unroll 1
        for (int n = 0; n < own_sets; ++n) {
            const int set = forwards ? n : own_sets - 1 - n;
            S* const at = slots + slot * set_size * tiling.row;
            wait_for_older_copies(tiling.slots - 1);
            warp_barrier();
            work(at);
            warp_barrier();
            copy(forwards ? set + tiling.slots : set - tiling.slots, at);
            slot += forwards ? 1 : -1;
            if (slot == tiling.slots) slot = 0;
            if (slot < 0) slot = tiling.slots - 1;
        }
    }

    // One pass over the sets: sum [J, 4] over this lane's input capsules, for its components. Logits are to
    // base 2.
    template <bool first>
    CAPSOPS_DEVICE void pass(bool forwards, float (&sum)[max_j][4]) const {
#pragma unroll
        for (int j = 0; j < max_j; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] = 0.0f;
        }
        if constexpr (tensor_cores) {
            uint32_t v[max_j][2];
#pragma unroll
            for (int j = 0; j < max_j; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    v[j][half] = !first && j < J ? column_pair(j, half) : 0;
                }
            }
            for_sets(forwards, [&](const S* at) { add_16<first>(at, v, sum); });
        } else {
            float v[max_j][4];
#pragma unroll
            for (int j = 0; j < max_j; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    v[j][e] = !first && j < J ? log2_e * total_v[j * size + component(e)] : 0.0f;
                }
            }
            for_sets(forwards,
                     [&](const S* at) { add<first>(at + lane / parts * tiling.row + 4 * part, v, sum); });
        }
    }

    // V_j as right operand: rounded to 16 bits in column 2 (j % 4), and the rounding error in the next
    // column, which together are accurate to 2^-17 of V in bfloat16 and 2^-22 in float16. The other columns
    // are 0, so that the products of four output capsules add up to the logits of all four: lane q has that
    // of j with j % 4 = q.
    CAPSOPS_DEVICE uint32_t column_pair(int j, int half) const {
        const int g = lane / 4, d = 2 * part + 8 * half;
        if (g / 2 != j % 4) return 0;
        float x[2];
        for (int e = 0; e < 2; ++e) {
            const float v = log2_e * total_v[j * size + d + e];
            S rounded;
            narrow(v, rounded);
            x[e] = g % 2 == 0 ? v : v - widen(rounded);
        }
        return pack_pair<S>(x[0], x[1]);
    }

    // Adds c u_hat of 16 input capsules, whose predictions begin at `from`. A lane has the components 2q, 2q
    // + 1, 2q + 8 and 2q + 9 of rows g and g + 8.
    template <bool first>
    CAPSOPS_DEVICE void add_16(const S* from, const uint32_t (&v)[max_j][2], float (&sum)[max_j][4]) const {
        constexpr int fours = (max_j + 3) / 4;
        uint32_t u_hat[max_j][4];
        float c[fours][2];
#pragma unroll
        for (int j = 0; j < max_j; ++j) {
            if (j >= J) continue;
            load_matrices(u_hat[j], from + lane % 16 * tiling.row + j * size + lane / 16 * 8);
        }
        if constexpr (!first) {
#pragma unroll
            for (int four = 0; four < fours; ++four) {
                float logits[4] = {};
#pragma unroll
                for (int j = 4 * four; j < 4 * four + 4 && j < max_j; ++j) {
                    if (j < J) mma_16_bit<S>(logits, u_hat[j], v[j]);
                }
                const bool valid = 4 * four + part < J;
                c[four][0] = valid ? logits[0] + logits[1] : -INFINITY;
                c[four][1] = valid ? logits[2] + logits[3] : -INFINITY;
            }
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                float largest = p.leaky ? 0.0f : -INFINITY, total = 0.0f;
#pragma unroll
                for (int four = 0; four < fours; ++four) largest = fmaxf(largest, c[four][row]);
                largest = lane_max(largest, 4);
                if (p.leaky && part == 0) total = power_of_2(-largest);
#pragma unroll
                for (int four = 0; four < fours; ++four) {
                    c[four][row] = power_of_2(c[four][row] - largest);
                    total += c[four][row];
                }
                const float inverse = 1.0f / lane_sum(total, 4);
#pragma unroll
                for (int four = 0; four < fours; ++four) c[four][row] *= inverse;
            }
        }
#pragma unroll
        for (int j = 0; j < max_j; ++j) {
            if (j >= J) continue;
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float coupling = first ? 1.0f : shuffle(c[j / 4][row], lane / 4 * 4 + j % 4);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 x = widen_pair<S>(u_hat[j][row + 2 * half]);
                    sum[j][2 * half] += coupling * x.x, sum[j][2 * half + 1] += coupling * x.y;
                }
            }
        }
    }

    // Adds c u_hat of one input capsule, whose predictions are at `from`.
    template <bool first>
    CAPSOPS_DEVICE void add(const S* from, const float (&v)[max_j][4], float (&sum)[max_j][4]) const {
        float u_hat[max_j][4], c[max_j];
#pragma unroll
        for (int j = 0; j < max_j; ++j) {
            c[j] = -INFINITY;
            if (j >= J) continue;
            load_quad(u_hat[j], from + j * size);
        }
        if (first) {
#pragma unroll
            for (int j = 0; j < max_j; ++j) {
                if (j >= J) continue;
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[j][e] += u_hat[j][e];
            }
            return;
        }
        float largest = p.leaky ? 0.0f : -INFINITY;
#pragma unroll
        for (int j = 0; j < max_j; ++j) {
            if (j >= J) continue;
            float logit = 0.0f;
#pragma unroll
            for (int e = 0; e < 4; ++e) logit += u_hat[j][e] * v[j][e];
            c[j] = lane_sum(logit, parts);
            largest = fmaxf(largest, c[j]);
        }
        float total = p.leaky ? power_of_2(-largest) : 0.0f;
#pragma unroll
        for (int j = 0; j < max_j; ++j) {
            if (j >= J) continue;
            c[j] = power_of_2(c[j] - largest);
            total += c[j];
        }
        const float inverse = 1.0f / total;
#pragma unroll
        for (int j = 0; j < max_j; ++j) {
            if (j >= J) continue;
            const float coupling = c[j] * inverse;
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] += coupling * u_hat[j][e];
        }
    }

    // Computes s, and from it V of the next pass or, after the last, v.
    CAPSOPS_DEVICE void finish(int t, float (&sum)[max_j][4]) const {
#pragma unroll
        for (int j = 0; j < max_j; ++j) {
            if (j >= J) continue;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float x = lane_sum(sum[j][e], warp_size / parts, parts);
                if (lane < parts) sums[(warp_index() * J + j) * size + component(e)] = x;
            }
        }
        block_barrier();
        const CapsuleLanes lanes(D);
        const bool writes = lanes.split == 0 && lanes.d < D;
        for (int j = warp_index(); j < J; j += warp_count()) {
            const int at = j * size + lanes.d;
            const int64_t global = (b * J + j) * D + lanes.d;
            if (writes) {
                float s = 0.0f;
                for (int warp = 0; warp < warp_count(); ++warp) s += sums[warp * J * size + at];
                if (t == 0) s *= p.first;
                if (p.bias != nullptr) s += load<S>(p.bias, j * D + lanes.d);
                weighted[at] = s;
                p.s[t * p.capsules() + global] = s;
            }
            warp_barrier();
            const Squash f = squash_of(D, lanes, [this, j](int64_t d) { return weighted[j * size + d]; });
            if (!writes) continue;
            const float v = f.value(weighted[at]);
            if (t + 1 == p.iterations) {
                narrow(v, static_cast<S*>(p.v)[global]);
            } else {
                total_v[at] = t == 0 ? v : total_v[at] + v;
            }
        }
        block_barrier();
    }

    CAPSOPS_DEVICE void run() const {
        float sum[max_j][4];
        for (int n = 0; n < tiling.slots; ++n) copy(n, slots + n * set_size * tiling.row);
        pass<true>(true, sum);
        finish(0, sum);
#pragma unroll 1
        for (int t = 1; t < p.iterations; ++t) {
            pass<false>(t % 2 == 0, sum);
            finish(t, sum);
        }
    }
};

template <typename S, int parts, int max_j, bool exact>
CAPSOPS_KERNEL(max_smem_cached_warps* warp_size, 1)
smem_cached_kernel(CAPSOPS_PARAMETER SmemCached cached) {
    if (block_index() < cached.p.B) Sample<S, parts, max_j, exact>(cached, block_index()).clear();
    for (int64_t b = block_index(); b < cached.p.B; b += block_count())
        Sample<S, parts, max_j, exact>(cached, b).run();
}

template <typename S, int parts>
void (*kernel_of(int64_t J))(SmemCached) {
    return J == max_smem_cached_j ? smem_cached_kernel<S, parts, max_smem_cached_j, true>
                                  : smem_cached_kernel<S, parts, max_smem_cached_j, false>;
}

}  // namespace

void smem_cached_passes(const SmemCached& call, Dtype dtype, Stream stream) {
    with_dtype(dtype, [&](auto type) {
        typedef decltype(type) S;
        const auto kernel = call.tiling.parts == 2   ? kernel_of<S, 2>(call.p.J)
                            : call.tiling.parts == 4 ? kernel_of<S, 4>(call.p.J)
                                                     : kernel_of<S, 8>(call.p.J);
        launch(kernel,
               Launch{"routing_smem_cached", blocks_for(call.p.B, 1), call.tiling.warps * warp_size,
                      call.tiling.shared, stream},
               call);
    });
}

}  // namespace capsops
