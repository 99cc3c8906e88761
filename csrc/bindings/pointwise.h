// A pointwise convolution on a CPU, for the bindings that end in one.
#pragma once

#include "../cpu/pointwise/pointwise.h"
#include "common.h"

namespace raccgan {
// y[n, d, h, w] = bias[d] + residual[n, d, h, w] + sum over c of x[n, c, h, w] w[d, c, 0, 0], with all operands but x
// checked; see ../ops/pointwise.h.
struct PointwiseCall {
  Tensor w, y;
  Optional bias, residual;
  ProductArgs args;  // of all pixels; `a`, which is x, is not set yet

  // `like` is any image with x's dtype and number of samples; x is [N, c, h, v]. packed: w as pointwise_native_packed
  // returned it, which saves time.
  PointwiseCall(const Tensor& like, int64_t c, int64_t h, int64_t v, const Tensor& w, const Optional& bias,
                const Optional& residual, const Optional& packed);

  // Packs w once for many calls of `rows`, unless it is packed already.
  void pack();

  void all(const Tensor& x);

  // Computes rows first <= m < first + count, for which x is at a; scratch: product_scratch(args) floats.
  void rows(int64_t first, int64_t count, const void* a, float* scratch) const;

 private:
  AlignedFloats panels_;
};
}  // namespace raccgan
