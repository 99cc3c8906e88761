// The CPU kernels: each function is a pass of ops/*.h on PyTorch's threads, compiled once a target (simd/targets.h).
// They take float32 and bfloat16, the anomaly score float16 too. Chunks whose sums are added up depend on the shape
// alone, so that all results have the same bits whatever the number of threads.
#pragma once

#include "../ops/anomaly_score.h"
#include "../ops/cbam.h"
#include "../ops/depthwise.h"
#include "../ops/moments.h"
#include "../ops/pointwise.h"
#include "simd/targets.h"

namespace raccgan {
// Rows that a thread multiplies at a time, at least.
constexpr int64_t kRowsATask = 64;

// pack_factor writes packed_factor floats, which serve any M: zero floats where b needs no packing. product_of_rows is of
// rows first <= m < first + count on one thread, with product_scratch floats of memory; `a` begins with the first.
#define RACCGAN_DECLARE(target, unused)                                                                            \
  namespace target {                                                                                               \
  void anomaly_score(int64_t n, const ImageArgs& images, const FeatureArgs* features, float* residual,             \
                     float* feature);                                                                              \
  void cbam_forward(const CbamForwardArgs& args);                                                                  \
  void cbam_backward(const CbamBackwardArgs& args);                                                                \
  void cbam_double_backward(const CbamDoubleBackwardArgs& args);                                                   \
  void depthwise_forward(const DepthwiseForwardArgs& args);                                                        \
  void depthwise_backward(const DepthwiseBackwardArgs& args);                                                      \
  void depthwise_double_backward(const DepthwiseDoubleBackwardArgs& args);                                         \
  void depthwise_separable(const DepthwiseForwardArgs& args, const float* bias, const ProductArgs& pointwise);     \
  void moments(const MomentsArgs& args, float* mean, float* var);                                                  \
  void moments_backward(const MomentsArgs& args, const float* grad_mean, const float* grad_var, const float* mean, \
                        void* grad);                                                                               \
  void product(const ProductArgs& args);                                                                           \
  int64_t product_scratch(const ProductArgs& args);                                                                \
  void product_of_rows(const ProductArgs& args, int64_t first, int64_t count, const void* a, float* scratch);      \
  void correlation(const CorrelationArgs& args);                                                                   \
  int64_t packed_factor(const ProductArgs& args);                                                                  \
  void pack_factor(const ProductArgs& args, float* packed);                                                        \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE
}  // namespace raccgan
