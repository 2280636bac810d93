// Routing for any shape, on u and weight or on precomputed predictions: float32 multiply-adds, no shared
// memory.
#pragma once

#include "routing.h"

namespace capsops {

// Into how many parts the general kernels split the sums over i.
int64_t general_splits(const Routing& p, const Device& device);

// The partial sums of pass p.t; before them, except in the first pass, the softmax of each (b, i).
void general_sums(const Routing& p, Dtype dtype, Stream stream);

// The largest logit, the sum of exponentials and, backward, the mean of a of pass p.t, for each (b, i).
void general_softmax(const Routing& p, Dtype dtype, Stream stream);

// The couplings c of pass p.t; before them its softmax.
void general_couplings(const Routing& p, Dtype dtype, Stream stream);

// du and dW, or the gradient of u_hat, from ds and softmax of all passes.
void general_gradients(const Routing& p, Dtype dtype, Stream stream);

}  // namespace capsops
