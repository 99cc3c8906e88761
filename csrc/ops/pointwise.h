// The arguments of the kernels of a pointwise convolution and of its two gradients, which are matrix products.
//
//     y[m, d] = bias[d] + residual[m, d] + sum over c of x[m, c] w[d, c]    (the first two are optional)
//     x[m, c] = sum over d of g[m, d] w[d, c]
//     w[d, c] = sum over m of g[m, d] x[m, c],    bias[d] = sum over m of g[m, d]
//
// Images are [M, C] in memory, M = N * H * W pixels, without gaps. C headers only, see cpu/simd/targets.h.
#pragma once

#include "dtype.h"

namespace raccgan {
// out[m, n] = bias[n] + residual[m, n] + sum over k of a[m, k] b[k, n]
struct ProductArgs {
  int64_t m, k, n;
  Dtype dtype;  // float32 or bfloat16, of a, residual and out
  const void* a;
  const float* b;   // [K, N], or [N, K] if `transposed`
  bool transposed;
  const float* packed;   // b as pack_factor writes it for this dtype, or null
  const float* bias;     // or null
  const void* residual;  // or null
  void* out;
};

// out[i, j] = sum over m of a[m, i] b[m, j],    sums[i] = sum over m of a[m, i]
struct CorrelationArgs {
  int64_t m, i, j;
  Dtype dtype;  // float32 or bfloat16, of a and b
  const void *a, *b;
  float* out;
  float* sums;  // or null
};
}  // namespace raccgan
