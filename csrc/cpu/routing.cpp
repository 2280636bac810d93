// Routing by agreement and its full gradient, without storing û. The formulas are in capsops/reference.py.
//
// An engine (routing_batch_simd.h or routing_capsule_simd.h) computes the passes over û. This file computes
// the steps between them, on tensors of B·J·D numbers. All threads wait for one another between passes.
#include "routing_batch_simd.h"
#include "routing_capsule_simd.h"
#include "squash.h"

namespace capsops {
namespace CAPSOPS_ISA {
namespace {

// The couplings of the first pass, whose logits are all 0; 1 without routing.
template <typename T>
T uniform_coupling(const RoutingCall& call) {
    return call.iterations == 0 ? T(1) : T(1) / T(call.J + call.leaky);
}

int64_t passes(const RoutingCall& call) { return larger(call.iterations, 1); }

// How many passes with a softmax take part in the gradient.
int64_t routed_terms(const RoutingCall& call) {
    if (call.detach) return smaller(passes(call) - 1, 1);
    return passes(call) - 1;
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
    T* row;      // scratch of each thread [threads, R]
    T* bias;     // [R]

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
          bias(nullptr) {}

    void plan(Arena& arena, int threads, bool backward) {
        engine.plan(arena, threads, backward);
        partial = arena.take<T>(engine.splits * size);
        total_v = arena.take<T>(larger(backward ? passes(call) - 1 : 1, 1) * size);
        grad_s = arena.take<T>(backward ? passes(call) * size : 0);
        grad_v = arena.take<T>(backward ? size : 0);
        row = arena.take<T>(round_up(R, 64) * threads);
        bias = arena.take<T>(R);
    }

    T summed(int64_t at) const {
        T total = partial[at];
        for (int64_t split = 1; split < engine.splits; ++split) total += partial[split * size + at];
        return total;
    }

    // Computes `count` passes. Writes each sᵗ to s and adds each vᵗ but the last to V. Writes the last vᵗ, or
    // its sᵗ, to v; with v null it is added to V too.
    void forward(const Team& team, T* s, int64_t count, void* v) {
        const int64_t J = call.J, D = call.D, rows = call.B * J;
        T* v_row = row + round_up(R, 64) * team.rank;
        if (call.bias && team.rank == 0) read_row(call.bias, call.dtype, 0, R, bias);
        for (int64_t t = 0; t < count; ++t) {
            if (t == 0) {
                engine.sum_uniform(team, t, partial);
            } else {
                engine.prepare(team, 0, total_v);
                team.barrier();
                engine.sum_routed(team, t, 0, partial);
            }
            team.barrier();
            const T scale = t == 0 ? uniform_coupling<T>(call) : T(1);
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
            if (t > 0 && t > last - terms) {
                const int64_t term = t - (last - terms) - 1;
                engine.prepare(team, term, total_v + (t - 1) * size);
                engine.prepare(team, terms + term, grad_s + t * size);
                team.barrier();
            }
            if (t == 0 || call.detach) break;
            engine.sum_agreement(team, t, t - 1, terms + t - 1, partial);
            team.barrier();
            for (int64_t at = begin * D; at < end * D; ++at) grad_v[at] += summed(at);
        }
        const int64_t first = call.detach ? last : 0;  // the first pass that has a gradient
        const bool uniform = first == 0;
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
        if (call.grad_u || call.grad_weight) engine.gradient(team, terms, uniform, !call.detach);
    }
};

int64_t slots_of(RoutingOp op, const RoutingCall& call) {
    return op == RoutingOp::backward ? 2 * routed_terms(call) + 1 : 1;
}

// All threads share the work of every sample.
template <typename T, typename Engine>
bool route_shared(RoutingOp op, const RoutingCall& call, int threads) {
    const int64_t R = call.J * call.D, size = call.B * R;
    // Keeps s of every pass, except for couplings, which only need that of the last.
    Routing<T, Engine> routing(call, slots_of(op, call), threads, op == RoutingOp::couplings ? 0 : size);
    T *bias_total = nullptr, *s = nullptr;
    auto plan = [&](Arena& arena) {
        routing.plan(arena, threads, op == RoutingOp::backward);
        bias_total = arena.take<T>(R);
        s = op == RoutingOp::couplings ? arena.take<T>(size) : static_cast<T*>(call.s);
    };
    Arena measure;
    plan(measure);
    Buffer buffer(measure.used());
    if (!buffer.base) return false;
    Arena arena(buffer.base);
    plan(arena);
    std::memset(bias_total, 0, R * sizeof(T));
    run_team(threads, [&](const Team& team) {
        if (op == RoutingOp::forward) {
            routing.forward(team, s, passes(call), call.v);
        } else if (op == RoutingOp::backward) {
            routing.backward(team, s, bias_total);
        } else {
            routing.forward(team, s, call.iterations - 1, nullptr);
            routing.engine.prepare(team, 0, routing.total_v);
            team.barrier();
            routing.engine.couplings(team, 0);
        }
    });
    if (op == RoutingOp::backward) write_row(call.grad_bias, call.dtype, 0, R, bias_total);
    return true;
}

// Each thread routes its own samples, so that the precomputed predictions of a sample stay in the thread's
// cache from pass to pass.
template <typename T, typename Engine>
bool route_by_sample(RoutingOp op, const RoutingCall& call, int threads) {
    const int64_t R = call.J * call.D, predictions = call.I * R;
    T *bias_totals = nullptr, *bias_total = nullptr;
    char* pool = nullptr;
    RoutingCall sample_call = call;
    sample_call.B = 1;
    Routing<T, Engine> sample(sample_call, slots_of(op, call), 1, call.B * R);
    Arena sample_size;
    sample.plan(sample_size, 1, op == RoutingOp::backward);
    auto plan = [&](Arena& arena) {
        bias_totals = arena.take<T>(round_up(R, 64) * threads);
        bias_total = arena.take<T>(R);
        pool = arena.take<char>(sample_size.used() * threads);
    };
    Arena measure;
    plan(measure);
    Buffer buffer(measure.used());
    if (!buffer.base) return false;
    Arena arena(buffer.base);
    plan(arena);
    std::memset(bias_totals, 0, round_up(R, 64) * threads * sizeof(T));
    run_team(threads, [&](const Team& team) {
        for (int64_t b = team.begin(call.B); b < team.end(call.B); ++b) {
            RoutingCall own_call = sample_call;
            own_call.u = element(call.u, call.dtype, b * predictions);
            Arena own_arena(pool + sample_size.used() * team.rank);
            if (op == RoutingOp::forward) own_call.v = element(call.v, call.dtype, b * R);
            if (op == RoutingOp::backward) {
                own_call.grad = element(call.grad, call.dtype, b * R);
                own_call.grad_u = element(call.grad_u, call.dtype, b * predictions);
            }
            Routing<T, Engine> routing(own_call, slots_of(op, call), 1, call.B * R);
            routing.plan(own_arena, 1, op == RoutingOp::backward);
            T* s = static_cast<T*>(call.s) + b * R;
            if (op == RoutingOp::forward) {
                routing.forward(single_thread, s, passes(call), own_call.v);
            } else {
                routing.backward(single_thread, s, bias_totals + round_up(R, 64) * team.rank);
            }
        }
    });
    if (op == RoutingOp::backward) {
        for (int64_t r = 0; r < R; ++r) {
            bias_total[r] = 0;
            for (int rank = 0; rank < threads; ++rank)
                bias_total[r] += bias_totals[round_up(R, 64) * rank + r];
        }
        write_row(call.grad_bias, call.dtype, 0, R, bias_total);
    }
    return true;
}

template <typename T, int N>
bool route_capsule_simd(RoutingOp op, const RoutingCall& call, int threads) {
    if (call.weight) return route_shared<T, CapsuleSimdEngine<T, N, false>>(op, call, threads);
    if (call.B >= threads) return route_by_sample<T, CapsuleSimdEngine<T, N, true>>(op, call, threads);
    return route_shared<T, CapsuleSimdEngine<T, N, true>>(op, call, threads);
}

template <typename T>
bool route(RoutingOp op, const RoutingCall& call, int max_threads) {
    constexpr int width = vec_width<T>;
    const int64_t work = call.B * call.I * call.J * call.D * (call.weight ? call.K : 1) * passes(call);
    const int threads = work < 131072 ? 1 : max_threads;
    if (BatchSimdEngine<T>::supports(call)) return route_shared<T, BatchSimdEngine<T>>(op, call, threads);
    // Use half registers where the numbers of a pair (i, j) fill those but not whole ones.
    const int64_t numbers = call.D * (call.weight ? call.K : 1);
    if constexpr (sizeof(T) == 4) {
        if (numbers % width != 0 && numbers % (width / 2) == 0)
            return route_capsule_simd<T, width / 2>(op, call, threads);
    }
    return route_capsule_simd<T, width>(op, call, threads);
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
