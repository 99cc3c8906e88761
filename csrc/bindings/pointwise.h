// A pointwise convolution on a CPU, for the bindings that end in one.
#pragma once

#include "common.h"

namespace raccgan {

// y[n, d, h, w] = bias[d] + residual[n, d, h, w] + sum over c of x[n, c, h, w] w[d, c, 0, 0]; see ../cpu/pointwise.h.
// packed: w as pointwise_native_packed returned it, which saves time.
Tensor pointwise_cpu(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, const std::optional<Tensor>& packed);

}  // namespace raccgan
