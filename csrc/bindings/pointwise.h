// A pointwise convolution on a CPU, for the bindings that end in one.
#pragma once

#include "../cpu/pointwise/pointwise.h"
#include "common.h"

namespace raccgan {

// y[n, d, h, w] = bias[d] + residual[n, d, h, w] + sum over c of x[n, c, h, w] w[d, c, 0, 0], with all of it but x there
// and checked; see ../cpu/pointwise.h.
struct PointwiseCall {
  Tensor w, y;
  std::optional<Tensor> bias, residual;
  ProductArgs args;  // of all pixels; `a`, which is x, is left open

  // packed: w as pointwise_native_packed returned it, which saves time. `like` is any image of x's dtype, and x is
  // [N, C, H, W] with as many samples.
  PointwiseCall(const Tensor& like, int64_t c, int64_t h, int64_t v, const Tensor& w,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& packed);

  // For calls with a part of the rows each: packs w for all of them, where that is not done.
  void pack();

  // Computes all of y for x.
  void all(const Tensor& x);

  // Computes rows first <= m < first + count, for which x is at a; scratch: product_scratch(args) floats.
  void rows(int64_t first, int64_t count, const void* a, float* scratch) const;

 private:
  AlignedFloats panels_;
};

}  // namespace raccgan
