// Routing by agreement and its full gradient, without storing û. The formulas are in capsops/reference.py.
//
// An engine, in one of the files routing_*_simd.h, computes the passes over û. This file computes the steps
// between them, on tensors of B·J·D numbers, and chooses the engine:
//
//   routing_batch_simd.h        u and weight, many samples
//   routing_capsule_simd.h      u and weight, a few samples of a large layer
//   routing_predictions_simd.h  precomputed predictions, and a few samples of a layer that fits the cache
//   routing_small_simd.h        precomputed predictions of a few input capsules, many samples
//   routing_shared_simd.h       a weight that all input capsules share
//
// All threads wait for one another between passes.
#include "routing_batch_simd.h"
#include "routing_capsule_simd.h"
#include "routing_predictions_simd.h"
#include "routing_shared_simd.h"
#include "routing_small_simd.h"
#include "squash.h"

namespace capsops {
namespace CAPSOPS_ISA {

bool predictions(const PredictionsCall& call, int threads);
bool predictions_backward(const PredictionsCall& call, int threads);

namespace {

// The couplings of the first pass, whose logits are all 0; 1 without routing.
template <typename T>
T uniform_coupling(const RoutingCall& call) {
    return call.iterations == 0 ? T(1) : T(1) / T(call.J + call.leaky);
}

int64_t passes(const RoutingCall& call) { return larger(call.iterations, 1); }

// How many passes have couplings of their own: not the first, unless it has starting logits.
int64_t routed_passes(const RoutingCall& call) { return passes(call) - (call.logits.data ? 0 : 1); }

// How many of these take part in the gradient.
int64_t routed_terms(const RoutingCall& call) {
    return call.detach ? smaller(routed_passes(call), 1) : routed_passes(call);
}

// Routing of the samples of one call by an engine. All threads of a team call the same functions.
template <typename T, typename Engine>
struct Routing {
    const RoutingCall& call;
    const int64_t R, size;   // J·D, B·J·D
    const int64_t s_stride;  // from the s of one pass to that of the next
    Engine engine;
    T* partial;  // [splits, B, R]
    T* total_v;  // forward: V [B, R]; backward: V of every pass but the first [passes − 1, B, R]
    T* grad_s;   // backward: ∂s of every pass [passes, B, R]
    T* grad_v;   // backward: ∂V [B, R]
    T* row;      // scratch of each thread, one output capsule [threads, R in whole cache lines]
    T* bias;     // [R]
    T* zeros;    // V of the first pass, where it has logits [B, R]

    Routing(const RoutingCall& c, int64_t slots, int threads, int64_t stride)
        : call(c),
          R(c.J * c.D),
          size(c.B * R),
          s_stride(stride),
          engine(c, slots, threads),
          partial(nullptr),
          total_v(nullptr),
          grad_s(nullptr),
          grad_v(nullptr),
          row(nullptr),
          bias(nullptr),
          zeros(nullptr) {}

    void plan(Arena& arena, int threads, bool backward) {
        engine.plan(arena, threads, backward);
        partial = arena.take<T>(engine.splits * size);
        total_v = arena.take<T>(larger(backward ? passes(call) - 1 : 1, 1) * size);
        grad_s = arena.take<T>(backward ? passes(call) * size : 0);
        grad_v = arena.take<T>(backward ? size : 0);
        row = arena.take<T>(round_up(R, 64) * threads);
        bias = arena.take<T>(R);
        zeros = arena.take<T>(call.logits.data ? size : 0);
    }

    T summed(int64_t at) const {
        T total = partial[at];
        for (int64_t split = 1; split < engine.splits; ++split) total += partial[split * size + at];
        return total;
    }

    // V of the first pass; the team waits before it is used.
    void clear_zeros(const Team& team) {
        const int64_t numbers = call.logits.data ? size : 0;
        for (int64_t at = team.begin(numbers); at < team.end(numbers); ++at) zeros[at] = 0;
        if (numbers > 0) team.barrier();
    }

    // V of pass t in slot 0, after the passes before it.
    void prepare_v(const Team& team, int64_t t) { engine.prepare(team, 0, t == 0 ? zeros : total_v); }

    // Computes `count` passes. Writes each sᵗ to s and adds each vᵗ but the last to V. Writes the last vᵗ, or
    // its sᵗ, to v; with v null it is added to V too.
    void forward(const Team& team, T* s, int64_t count, void* v) {
        const int64_t J = call.J, D = call.D, rows = call.B * J;
        T* v_row = row + round_up(R, 64) * team.rank;
        const bool starts_uniform = !call.logits.data;
        if (call.bias && team.rank == 0) read_row(call.bias, call.dtype, 0, R, bias);
        clear_zeros(team);
        for (int64_t t = 0; t < count; ++t) {
            if (t == 0 && starts_uniform) {
                engine.sum_uniform(team, t, partial);
            } else {
                prepare_v(team, t);
                team.barrier();
                engine.sum_routed(team, t, 0, partial);
            }
            team.barrier();
            const T scale = t == 0 && starts_uniform ? uniform_coupling<T>(call) : T(1);
            for (int64_t n = team.begin(rows); n < team.end(rows); ++n) {
                T* s_row = s + t * s_stride + n * D;
                for (int64_t d = 0; d < D; ++d) {
                    s_row[d] = scale * summed(n * D + d);
                    if (call.bias) s_row[d] += bias[n % J * D + d];
                }
                squash_row(s_row, D, v_row);
                if (v && t + 1 == count) {
                    write_row(v, call.dtype, n * D, D, call.squash_output ? v_row : s_row);
                } else {
                    T* total = total_v + n * D;
                    for (int64_t d = 0; d < D; ++d) total[d] = t == 0 ? v_row[d] : total[d] + v_row[d];
                }
            }
            team.barrier();
        }
    }

    // Computes ∂u and ∂W, and adds ∂β of these samples to grad_bias.
    void backward(const Team& team, const T* s, T* grad_bias) {
        const int64_t D = call.D, rows = call.B * call.J, last = passes(call) - 1;
        const int64_t terms = routed_terms(call);
        const int64_t begin = team.begin(rows), end = team.end(rows);
        T* scratch = row + round_up(R, 64) * team.rank;
        clear_zeros(team);
        for (int64_t n = begin; n < end; ++n) {
            for (int64_t t = 0; t < last; ++t) {
                T* total = total_v + t * size + n * D;
                squash_row(s + t * s_stride + n * D, D, total);
                for (int64_t d = 0; t > 0 && d < D; ++d) total[d] += total[d - size];
            }
            for (int64_t d = 0; d < D; ++d) grad_v[n * D + d] = 0;
        }
        for (int64_t t = last; t >= 0; --t) {
            for (int64_t n = begin; n < end; ++n) {
                const T* g = grad_v + n * D;
                T* grad_row = grad_s + t * size + n * D;
                if (t == last && !call.squash_output) {
                    read_row(call.grad, call.dtype, n * D, D, grad_row);
                    continue;
                }
                if (t == last) {
                    read_row(call.grad, call.dtype, n * D, D, scratch);
                    g = scratch;
                }
                squash_vjp_row(s + t * s_stride + n * D, g, D, grad_row);
            }
            team.barrier();
            const int64_t term = t - (last - terms) - 1;  // its number among the terms, if it is one
            if (term >= 0) {
                engine.prepare(team, term, t == 0 ? zeros : total_v + (t - 1) * size);
                engine.prepare(team, terms + term, grad_s + t * size);
                team.barrier();
            }
            if (t == 0 || call.detach) break;
            engine.sum_agreement(team, t, term, terms + term, partial);
            team.barrier();
            for (int64_t at = begin * D; at < end * D; ++at) grad_v[at] += summed(at);
        }
        const int64_t first = call.detach ? last : 0;  // the first pass that has a gradient
        const bool uniform = first == 0 && !call.logits.data;
        if (uniform) {
            // ∂β needs ∂s without the scale, so the scaled copy overwrites ∂V, which is no longer needed.
            const T scale = uniform_coupling<T>(call);
            for (int64_t at = begin * D; at < end * D; ++at) grad_v[at] = scale * grad_s[at];
            team.barrier();
            engine.prepare(team, 2 * terms, grad_v);
        }
        for (int64_t r = team.begin(R); r < team.end(R); ++r) {
            for (int64_t t = first; t <= last; ++t) {
                for (int64_t b = 0; b < call.B; ++b) grad_bias[r] += grad_s[t * size + b * R + r];
            }
        }
        team.barrier();
        if (call.grad_u || call.grad_weight || engine.grad_logits)
            engine.gradient(team, terms, uniform, !call.detach && call.iterations > 0);
    }
};

int64_t slots_of(RoutingOp op, const RoutingCall& call) {
    return op == RoutingOp::backward ? 2 * routed_terms(call) + 1 : 1;
}

// What the threads of a call have in common beside its engines: the weight, where it is shared, and sums over
// samples of the gradients.
template <typename T, typename Engine>
struct Sums {
    static constexpr bool shared = std::is_same<Engine, SharedSimdEngine<T>>::value;
    const RoutingCall& call;
    const int threads;
    const bool backward, converts;  // converts: a shared weight to T
    const int64_t R, weights;       // J·D, numbers of a shared weight
    LogitsGradient<T> grad_logits;
    T* weight = nullptr;       // [J, D, K]
    T* grad_weight = nullptr;  // [threads, J, D, K]
    T* grad_bias = nullptr;    // [threads, R in whole cache lines]

    Sums(RoutingOp op, const RoutingCall& c, int n)
        : call(c),
          threads(n),
          backward(op == RoutingOp::backward),
          converts(shared && c.weight && !is_native<T>(c.dtype)),
          R(c.J * c.D),
          weights(R * c.K),
          grad_logits(c) {}

    int64_t bias_stride() const { return round_up(R, 64); }

    void plan(Arena& arena) {
        weight = arena.take<T>(converts ? weights : 0);
        grad_weight = arena.take<T>(shared && call.grad_weight ? weights * threads : 0);
        grad_bias = arena.take<T>(backward ? bias_stride() * threads : 0);
        if (backward) grad_logits.plan(arena, threads, Engine::threads_own_inputs);
    }

    // Before the threads start.
    void begin() {
        if (converts) read_row(call.weight, call.dtype, 0, weights, weight);
        if (!backward) return;
        std::memset(grad_bias, 0, bias_stride() * threads * sizeof(T));
        if (shared && call.grad_weight) std::memset(grad_weight, 0, weights * threads * sizeof(T));
        grad_logits.clear();
        if (call.grad_logits && call.iterations == 0) {  // starting logits have no effect then
            std::memset(call.grad_logits, 0, grad_logits.numbers() * dtype_size(call.dtype));
        }
    }

    void give(Engine& engine) const {
        engine.grad_logits = backward && grad_logits.needed() && call.iterations > 0 ? &grad_logits : nullptr;
        if constexpr (shared) {
            engine.weight = converts ? weight : static_cast<const T*>(call.weight);
            engine.grad_weight = call.grad_weight ? grad_weight : nullptr;
        }
    }

    // After they have ended.
    void finish() {
        if (!backward) return;
        add_up(grad_bias, bias_stride(), R, call.grad_bias);
        if (shared && call.grad_weight) add_up(grad_weight, weights, weights, call.grad_weight);
        if (call.iterations > 0) grad_logits.finish();
    }

  private:
    // Writes the sum of what each thread has.
    void add_up(T* sums, int64_t stride, int64_t numbers, void* out) {
        for (int rank = 1; rank < threads; ++rank) {
            for (int64_t at = 0; at < numbers; ++at) sums[at] += sums[rank * stride + at];
        }
        write_row(out, call.dtype, 0, numbers, sums);
    }
};

// One op on the samples of a call or on one of them.
template <typename T, typename Engine>
void run(RoutingOp op, Routing<T, Engine>& routing, const Team& team, T* s, T* grad_bias) {
    const RoutingCall& call = routing.call;
    if (op == RoutingOp::forward) {
        routing.forward(team, s, passes(call), call.v);
    } else if (op == RoutingOp::backward) {
        routing.backward(team, s, grad_bias);
    } else {
        routing.forward(team, s, passes(call) - 1, nullptr);
        routing.prepare_v(team, passes(call) - 1);
        team.barrier();
        routing.engine.couplings(team, 0);
    }
}

// All threads share the work of every sample.
template <typename T, typename Engine>
bool route_by_all_threads(RoutingOp op, const RoutingCall& call, int threads) {
    const int64_t size = call.B * call.J * call.D;
    // Keeps s of every pass, except for couplings, which only need that of the last.
    Routing<T, Engine> routing(call, slots_of(op, call), threads, op == RoutingOp::couplings ? 0 : size);
    Sums<T, Engine> sums(op, call, threads);
    T* s = nullptr;
    auto plan = [&](Arena& arena) {
        routing.plan(arena, threads, op == RoutingOp::backward);
        sums.plan(arena);
        s = op == RoutingOp::couplings ? arena.take<T>(size) : static_cast<T*>(call.s);
    };
    Arena measure;
    plan(measure);
    Buffer buffer(measure.used());
    if (!buffer.base) return false;
    Arena arena(buffer.base);
    plan(arena);
    sums.begin();
    sums.give(routing.engine);
    // The threads' shares of ∂β do not overlap: one sum is enough.
    run_team(threads, [&](const Team& team) { run(op, routing, team, s, sums.grad_bias); });
    sums.finish();
    return true;
}

// The call for some samples, the first of which is b.
template <typename T>
RoutingCall call_of_samples(const RoutingCall& call, int64_t b, int64_t samples) {
    const int64_t R = call.J * call.D;
    const int64_t inputs = call.I * (call.weight ? call.K : call.shared ? call.D : R);
    auto at = [&](auto* tensor, int64_t numbers) {
        return tensor ? element(tensor, call.dtype, b * numbers) : tensor;
    };
    RoutingCall sample = call;
    sample.B = smaller(samples, call.B - b);
    const Dtype dtype = call.weight || call.shared ? call.dtype : call.u_hat_dtype;
    sample.u = element(call.u, dtype, b * inputs);
    sample.grad_u = call.grad_u ? element(call.grad_u, dtype, b * inputs) : nullptr;
    sample.v = at(call.v, R);
    sample.grad = at(call.grad, R);
    sample.couplings = at(call.couplings, call.I * call.J);
    sample.s = call.s ? static_cast<T*>(call.s) + b * R : nullptr;
    sample.mask = call.mask ? call.mask + b * call.I : nullptr;
    sample.logits.data = at(call.logits.data, call.logits.strides[0]);
    return sample;
}

// Each thread routes its own samples, some at a time, so that what it reads of them stays in its cache from
// pass to pass.
template <typename T, typename Engine>
bool route_by_sample(RoutingOp op, const RoutingCall& call, int threads, int64_t samples = 1) {
    const int64_t R = call.J * call.D, s_stride = op == RoutingOp::couplings ? 0 : call.B * R;
    const RoutingCall first = call_of_samples<T>(call, 0, samples);
    Routing<T, Engine> sample(first, slots_of(op, call), 1, s_stride);
    Arena sample_size;
    sample.plan(sample_size, 1, op == RoutingOp::backward);
    Sums<T, Engine> sums(op, call, threads);
    char* pool = nullptr;
    T* last_s = nullptr;  // of each thread, for couplings
    auto plan = [&](Arena& arena) {
        sums.plan(arena);
        pool = arena.take<char>(sample_size.used() * threads);
        last_s = arena.take<T>(op == RoutingOp::couplings ? samples * sums.bias_stride() * threads : 0);
    };
    Arena measure;
    plan(measure);
    Buffer buffer(measure.used());
    if (!buffer.base) return false;
    Arena arena(buffer.base);
    plan(arena);
    sums.begin();
    run_team(threads, [&](const Team& team) {
        const int64_t groups = divide_up(call.B, samples);
        for (int64_t group = team.begin(groups); group < team.end(groups); ++group) {
            const int64_t b = group * samples;
            const RoutingCall own_call = call_of_samples<T>(call, b, samples);
            Arena own_arena(pool + sample_size.used() * team.rank);
            Routing<T, Engine> routing(own_call, slots_of(op, call), 1, s_stride);
            routing.plan(own_arena, 1, op == RoutingOp::backward);
            sums.give(routing.engine);
            routing.engine.first_sample = b;
            routing.engine.first_rank = team.rank;
            const int64_t own = sums.bias_stride() * team.rank;
            T* s = op == RoutingOp::couplings ? last_s + samples * own : static_cast<T*>(own_call.s);
            run(op, routing, single_thread, s, sums.grad_bias + own);
        }
    });
    sums.finish();
    return true;
}

// Calls work(N) for engines that have the numbers of a pair (i, j) in the N lanes of a register: half a
// register where the numbers fill that but no whole one.
template <typename T, typename Work>
bool with_lanes(const RoutingCall& call, const Work& work) {
    constexpr int width = vec_width<T>;
    const int64_t numbers = call.D * (call.weight ? call.K : 1);
    if constexpr (sizeof(T) == 4) {
        if (numbers % width != 0 && numbers % (width / 2) == 0)
            return work(std::integral_constant<int, width / 2>{});
    }
    return work(std::integral_constant<int, width>{});
}

// Whether a few samples are routed with û in scratch memory: W is then read once, not in every pass, and û
// stays in the second-level caches of the threads, or nearly.
template <typename T>
bool stores_predictions(const RoutingCall& call, int threads) {
    const int64_t bytes = call.B * call.I * call.J * call.D * int64_t(sizeof(T));
    return call.weight && !call.shared && call.B < call.K && bytes <= threads * (int64_t(4) << 20);
}

// ∂û takes the place of û.
template <typename T>
bool route_stored(RoutingOp op, const RoutingCall& call, int threads) {
    const int64_t inputs = call.B * call.I * call.K, numbers = call.B * call.I * call.J * call.D;
    const int64_t element_size = dtype_size(call.dtype);
    // NaN in an absent u_i would otherwise reach ∂W.
    const bool copies = call.mask && call.grad_weight;
    char* u = nullptr;
    T* u_hat = nullptr;
    auto plan = [&](Arena& arena) {
        u = arena.take<char>(copies ? inputs * element_size : 0);
        u_hat = arena.take<T>(numbers);
    };
    Arena measure;
    plan(measure);
    Buffer buffer(measure.used());
    if (!buffer.base) return false;
    Arena arena(buffer.base);
    plan(arena);
    const int64_t row = call.K * element_size;
    if (copies) std::memcpy(u, call.u, inputs * element_size);
    for (int64_t b = 0; copies && b < call.B; ++b)
        clear_absent(call, b, 0, call.I, row, u + b * call.I * row);
    PredictionsCall layer{};
    layer.B = call.B, layer.I = call.I, layer.J = call.J, layer.D = call.D, layer.K = call.K;
    layer.dtype = call.dtype, layer.u_hat_dtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
    layer.u = copies ? u : call.u, layer.weight = call.weight, layer.u_hat = u_hat;
    if (!predictions(layer, threads)) return false;
    RoutingCall routed = call;
    routed.u = u_hat, routed.u_hat_dtype = layer.u_hat_dtype, routed.weight = nullptr, routed.K = 1;
    const bool needs_u_hat = call.grad_u || call.grad_weight || call.grad_logits;
    routed.grad_u = needs_u_hat ? u_hat : nullptr, routed.grad_weight = nullptr;
    const bool done = with_lanes<T>(routed, [&](auto N) {
        return route_by_all_threads<T, PredictionsSimdEngine<T, N>>(op, routed, threads);
    });
    if (!done) return false;
    if (op != RoutingOp::backward) return true;
    layer.grad = u_hat, layer.grad_u = call.grad_u, layer.grad_weight = call.grad_weight;
    if (!predictions_backward(layer, threads)) return false;
    for (int64_t b = 0; call.grad_u && b < call.B; ++b)  // 0 even where W is infinite
        clear_absent(call, b, 0, call.I, row, static_cast<char*>(call.grad_u) + b * call.I * row);
    return true;
}

template <typename T>
bool route(RoutingOp op, const RoutingCall& call, int max_threads) {
    // Multiply-adds for each pair (i, j): of W_ij u_i, or of u_i and Wᵀ V, or of û.
    const int64_t numbers = !call.weight ? call.D : call.shared ? call.K : call.D * call.K;
    const int64_t work = call.B * call.I * call.J * numbers * passes(call);
    const int threads = work < 131072 ? 1 : max_threads;
    if (call.shared && call.B >= threads) return route_by_sample<T, SharedSimdEngine<T>>(op, call, threads);
    if (call.shared) return route_by_all_threads<T, SharedSimdEngine<T>>(op, call, threads);
    if (SmallSimdEngine<T>::supports(op, call, threads)) {
        return route_by_sample<T, SmallSimdEngine<T>>(op, call, threads, SmallSimdEngine<T>::samples);
    }
    if (stores_predictions<T>(call, threads)) return route_stored<T>(op, call, threads);
    if (BatchSimdEngine<T>::supports(call))
        return route_by_all_threads<T, BatchSimdEngine<T>>(op, call, threads);
    return with_lanes<T>(call, [&](auto N) {
        if (call.weight) return route_by_all_threads<T, CapsuleSimdEngine<T, N>>(op, call, threads);
        if (call.B >= threads) return route_by_sample<T, PredictionsSimdEngine<T, N>>(op, call, threads);
        return route_by_all_threads<T, PredictionsSimdEngine<T, N>>(op, call, threads);
    });
}

}  // namespace

bool routing(RoutingOp op, const RoutingCall& call, int threads) {
    return call.dtype == Dtype::float64 ? route<double>(op, call, threads) : route<float>(op, call, threads);
}

double fma_flops(double seconds, int threads) {
    constexpr int chains = register_bytes == 64 ? 24 : 12;
    constexpr int64_t steps = 20000;
    double total = 0;
    run_team(threads, [&](const Team& team) {
        Vec<float> x[chains];
        for (int n = 0; n < chains; ++n) x[n] = Vec<float>{} + float(n + team.rank);
        const Vec<float> a = Vec<float>{} + 0.999f, b = Vec<float>{} + 0.001f;
        const double start = omp_get_wtime();
        double elapsed = 0;
        int64_t rounds = 0;
        for (; elapsed < seconds; ++rounds) {
            for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
                for (int n = 0; n < chains; ++n) x[n] = x[n] * a + b;
            }
            elapsed = omp_get_wtime() - start;
        }
        Vec<float> total_x = x[0];
        for (int n = 1; n < chains; ++n) total_x += x[n];
        const volatile float result = sum<float>(total_x);  // keeps the compiler from removing the loop
        (void)result;
        const double rate = double(rounds) * steps * chains * vec_width<float> * 2 / elapsed;
#pragma omp critical
        total += rate;
    });
    return total;
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
