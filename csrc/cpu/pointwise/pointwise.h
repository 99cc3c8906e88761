// The CPU kernels of a pointwise convolution and of its two gradients, which are matrix products; one set a target, see
// targets.h.
//
//     y[m, d] = bias[d] + residual[m, d] + sum over c of x[m, c] w[d, c]    (the first two are optional)
//     x[m, c] = sum over d of g[m, d] w[d, c]
//     w[d, c] = sum over m of g[m, d] x[m, c],    bias[d] = sum over m of g[m, d]
//
// Images are [M, C] in memory, M = N * H * W pixels, without gaps, float32 or bfloat16; the rest is float32, and so are
// all sums. To multiply bfloat16 images by more than a few columns the weights are rounded to bfloat16.
#pragma once

#include "../../ops/dtype.h"
#include "../simd/integers.h"
#include "../simd/targets.h"

namespace raccgan {

// out[m, n] = bias[n] + residual[m, n] + sum over k of a[m, k] b[k, n]
struct ProductArgs {
  int64_t m, k, n;
  Dtype dtype;  // float32 or bfloat16, of a, residual and out
  const void* a;
  const float* b;   // [K, N], or [N, K] if `transposed`
  bool transposed;
  const float* packed;   // what `pack` made of b for this dtype, or null
  const float* bias;     // or null
  const void* residual;  // or null
  void* out;
};

// partial[piece, i, j] = sum over the piece's m of a[m, i] b[m, j],   sums[piece, i] = sum over them of a[m, i]
struct CorrelationArgs {
  int64_t m, i, j;
  Dtype dtype;  // float32 or bfloat16, of a and b
  const void *a, *b;
  float* partial;
  float* sums;  // or null
};

// Few rows are shared out by columns: whoever has some rows packs all of b.
constexpr int64_t kRowsATask = 64;
static constexpr bool by_columns(const ProductArgs& args) { return args.m < 8 * kRowsATask; }

// Pixels that are added up apart in float32, by the shape alone, never by threads or hardware: the sum over pieces is
// always the same sum.
constexpr int64_t kCorrelationPiece = 4096;
static constexpr int64_t correlation_pieces(int64_t m) { return rounded_up(m, kCorrelationPiece) / kCorrelationPiece; }

// Each pass does the tasks begin <= i < end, which a caller may split over threads as it likes, with so many floats of
// scratch memory, aligned to 64 bytes, for each. pack_factor writes packed_factor floats, which serve any M; none of
// them where b is multiplied as it lies.
#define RACCGAN_DECLARE(target, unused)                                                             \
  namespace target {                                                                                \
  int64_t packed_factor(const ProductArgs& args);                                                   \
  void pack_factor(const ProductArgs& args, float* packed);                                         \
  int64_t product_tasks(const ProductArgs& args);                                                   \
  int64_t product_scratch(const ProductArgs& args);                                                 \
  void product(const ProductArgs& args, float* scratch, int64_t begin, int64_t end);                \
  int64_t correlation_tasks(const CorrelationArgs& args);                                           \
  int64_t correlation_scratch(const CorrelationArgs& args);                                         \
  void correlation(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end);        \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE

}  // namespace raccgan
