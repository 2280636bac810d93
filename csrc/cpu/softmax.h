// Softmax of the routing logits and its vector-Jacobian product, for samples in SIMD lanes and for one
// sample.
#pragma once

#include "threading.h"

namespace capsops {
namespace CAPSOPS_ISA {

// Where pairs may be closed, by logits of −inf, the softmax of nothing but closed pairs is 0: their largest
// logit counts as 0, and the sum of their exponentials as 1.
template <typename V>
CAPSOPS_INLINE V largest_of_closable(V top) {
    return top == V{} - __builtin_inff() ? V{} : top;
}
template <typename V>
CAPSOPS_INLINE V sum_of_closable(V total) {
    return total == V{} ? V{} + 1 : total;
}

// Softmax over J logits that are `stride` apart, in place. With `leaky` one more logit, fixed at 0, takes
// part.
template <typename T>
CAPSOPS_INLINE void softmax(Lanes<T>* c, int64_t J, int64_t stride, bool leaky, bool closable) {
    Lanes<T> top = leaky ? Lanes<T>::filled(0) : c[0];
    for (int64_t j = 0; j < J; ++j) top = maximum(top, c[j * stride]);
    for (int n = 0; closable && n < Lanes<T>::registers; ++n) top.part[n] = largest_of_closable(top.part[n]);
    Lanes<T> total = leaky ? exp_nonpositive(Lanes<T>::filled(0) - top) : Lanes<T>::filled(0);
    for (int64_t j = 0; j < J; ++j) {
        const Lanes<T> e = exp_nonpositive(c[j * stride] - top);
        c[j * stride] = e;
        total += e;
    }
    for (int n = 0; closable && n < Lanes<T>::registers; ++n) total.part[n] = sum_of_closable(total.part[n]);
    const Lanes<T> scale = Lanes<T>::filled(1) / total;
    for (int64_t j = 0; j < J; ++j) c[j * stride] = c[j * stride] * scale;
}

// The couplings without routing: 1, and 0 where the starting logit is −inf.
template <typename T>
CAPSOPS_INLINE void open_pairs(const Lanes<T>* logits, Lanes<T>* c, int64_t J, int64_t stride) {
    for (int64_t j = 0; j < J; ++j) {
        for (int n = 0; n < Lanes<T>::registers; ++n)
            c[j * stride].part[n] =
                logits[j].part[n] == Vec<T>{} - __builtin_inff() ? Vec<T>{} : Vec<T>{} + 1;
    }
}

// Replaces a by ∂b = c (a − Σ_j c a).
template <typename T>
CAPSOPS_INLINE void softmax_vjp(const Lanes<T>* c, Lanes<T>* a, int64_t J, int64_t stride) {
    Lanes<T> mean = Lanes<T>::filled(0);
    for (int64_t j = 0; j < J; ++j) add_product(mean, c[j * stride], a[j * stride]);
    for (int64_t j = 0; j < J; ++j) a[j * stride] = c[j * stride] * (a[j * stride] - mean);
}

// Softmax over the J logits of one sample, in place. c is padded to whole registers of N; the padding becomes
// 0.
template <typename T, int N>
CAPSOPS_INLINE void softmax(T* c, int64_t J, bool leaky, bool closable) {
    typedef typename VecOf<T, N>::Int Int;
    typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Index;
    const Int lanes = iota<Int, Index>(std::make_integer_sequence<int, N>{});
    const Vec<T, N> zero = Vec<T, N>{};
    const Vec<T, N> first = zero + (leaky ? T(0) : c[0]);
    Vec<T, N> top = first, total = zero;
    for (int64_t j = 0; j < J; j += N) {
        const Vec<T, N> x = lanes < Index(J - j) ? load<T, N>(c + j) : first;
        top = maximum(top, x);
    }
    top = over_lanes<N>(top, [](Vec<T, N> a, Vec<T, N> b) CAPSOPS_ALWAYS { return maximum(a, b); });
    if (closable) top = largest_of_closable(top);
    for (int64_t j = 0; j < J; j += N) {
        const Vec<T, N> e = exp_nonpositive<N>(load<T, N>(c + j) - top, T());
        const Vec<T, N> masked = lanes < Index(J - j) ? e : zero;
        store<T, N>(c + j, masked);
        total += masked;
    }
    total = over_lanes<N>(total, [](Vec<T, N> a, Vec<T, N> b) CAPSOPS_ALWAYS { return a + b; });
    if (leaky) total += exp_nonpositive<N>(zero - top, T());
    if (closable) total = sum_of_closable(total);
    for (int64_t j = 0; j < J; j += N) store<T, N>(c + j, load<T, N>(c + j) / total);
}

// The same for the J logits of one sample.
template <typename T>
CAPSOPS_INLINE void open_pairs(const T* logits, T* c, int64_t J) {
    for (int64_t j = 0; j < J; ++j) c[j] = logits[j] == -__builtin_inff() ? T(0) : T(1);
}
template <typename T>
CAPSOPS_INLINE void softmax_vjp(const T* c, T* a, int64_t J) {
    T mean = 0;
    for (int64_t j = 0; j < J; ++j) mean += c[j] * a[j];
    for (int64_t j = 0; j < J; ++j) a[j] = c[j] * (a[j] - mean);
}

}  // namespace CAPSOPS_ISA
}  // namespace capsops
