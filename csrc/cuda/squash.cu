// squash and its vector-Jacobian product along any dimension of a tensor seen as [outer, n, inner].
#include "kernels.h"
#include "squash.h"

namespace capsops {
namespace {

constexpr int threads = 256;

// `lanes` lanes share a vector if it is contiguous (inner = 1), else one thread has all of it.
struct Parameters {
    const void* s;
    const void* grad;
    void* out;
    int64_t outer, n, inner;
    int lanes;
};

// Calls function(index) for each component of a vector that this lane has; `width` components at a time.
template <int width, typename Function>
CAPSOPS_DEVICE void for_components(const Parameters& p, int64_t vector, Function function) {
    const int64_t first = vector / p.inner * p.n * p.inner + vector % p.inner;
    for (int64_t c = lane_index() % p.lanes * width; c < p.n; c += p.lanes * width) {
        function(first + c * p.inner);
    }
}

// `width` components that are read and written by one instruction.
template <typename S, int width>
struct alignas(width * sizeof(S)) Pack {
    S x[width];
};

template <typename S, int width, bool backward>
CAPSOPS_KERNEL(threads, 4)
squash_kernel(Parameters p) {
    typedef Pack<S, width> P;
    const S* const s = static_cast<const S*>(p.s);
    const S* const grad = static_cast<const S*>(p.grad);
    S* const out = static_cast<S*>(p.out);
    const auto pack = [](const S* x, int64_t at) { return *reinterpret_cast<const P*>(x + at); };
    const int64_t vectors = p.outer * p.inner, lanes = p.lanes;
    // All lanes of a warp take the same path: those beyond the last vector repeat it and write nothing.
    const int64_t per_warp = warp_size / lanes, step = block_count() * threads / lanes;
    for (int64_t base = (block_index() * threads + thread_index()) / warp_size * per_warp; base < vectors;
         base += step) {
        const int64_t index = base + lane_index() / lanes;
        const int64_t vector = index < vectors ? index : vectors - 1;
        float largest = 0.0f;
        for_components<width>(p, vector, [&](int64_t at) {
            const P x = pack(s, at);
            for (int e = 0; e < width; ++e) largest = fmaxf(largest, fabsf(widen(x.x[e])));
        });
        const float scale = length_scale(lane_max(largest, p.lanes));
        float square = 0.0f;
        for_components<width>(p, vector, [&](int64_t at) {
            const P x = pack(s, at);
            for (int e = 0; e < width; ++e) {
                const float y = widen(x.x[e]) / scale;
                square += y * y;
            }
        });
        const Squash f(scale, lane_sum(square, p.lanes));
        float along = 0.0f;
        if (backward) {
            for_components<width>(p, vector, [&](int64_t at) {
                const P x = pack(s, at), g = pack(grad, at);
                for (int e = 0; e < width; ++e) along += f.direction(widen(x.x[e])) * widen(g.x[e]);
            });
            along = lane_sum(along, p.lanes);
        }
        if (index >= vectors) continue;
        for_components<width>(p, vector, [&](int64_t at) {
            const P x = pack(s, at);
            P g = x, y;
            if (backward) g = pack(grad, at);
            for (int e = 0; e < width; ++e) {
                const float value = widen(x.x[e]);
                narrow(backward ? f.vjp(value, widen(g.x[e]), along) : f.value(value), y.x[e]);
            }
            *reinterpret_cast<P*>(out + at) = y;
        });
    }
}

template <bool backward>
void run(const SquashCall& call, Stream stream) {
    with_dtype(call.dtype, [&](auto type) {
        typedef decltype(type) S;
        constexpr int width = int(16 / sizeof(S));
        const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
        const bool wide = call.inner == 1 && call.n % width == 0 && aligned(call.s) && aligned(call.grad) &&
                          aligned(call.out);
        Parameters p{call.s, call.grad, call.out, call.outer, call.n, call.inner, 1};
        const int64_t packs = wide ? call.n / width : call.n;
        while (call.inner == 1 && p.lanes < warp_size && p.lanes < packs) p.lanes *= 2;
        const Launch config{backward ? "squash_backward" : "squash",
                            blocks_for(call.outer * call.inner * p.lanes, threads), threads, 0, stream};
        launch(wide ? squash_kernel<S, width, backward> : squash_kernel<S, 1, backward>, config, p);
    });
}

}  // namespace

void squash(const SquashCall& call, Stream stream) { run<false>(call, stream); }
void squash_backward(const SquashCall& call, Stream stream) { run<true>(call, stream); }

}  // namespace capsops
