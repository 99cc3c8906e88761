// The passes of ops/*.h on a GPU, for their bindings: no CUDA header, so that any C++ compiler takes it.
#pragma once

#include "../ops/anomaly_score.h"
#include "../ops/cbam.h"
#include "../ops/depthwise.h"
#include "../ops/moments.h"

namespace raccgan::cuda {
// The depthwise forward pass together with the matrix product, in one kernel: y = (L a) pointwise^T + bias + residual.
struct FusedArgs {
  DepthwiseLayer layer;
  int64_t d;              // channels of y, not zero
  const void* x;
  const void* pointwise;  // [D, C], of the layer's dtype
  const float* bias;      // [D], or null
  const void* residual;   // like y, or null
  bool tf32;              // whether the product may round float32 to tf32
  void* y;                // [N, H', W', D], out
};

// Each function below queues a pass on `stream` (a cudaStream_t) of `device`, and returns null, or CUDA's message if a
// launch failed. A pass of these arguments needs scratch memory of so many float32 numbers. No size of a depthwise layer
// is zero.
#define RACCGAN_PASS(Args)                  \
  int64_t scratch_floats(const Args& args); \
  const char* queue_pass(const Args& args, float* scratch, int device, void* stream);
RACCGAN_PASS(CbamForwardArgs)
RACCGAN_PASS(CbamBackwardArgs)
RACCGAN_PASS(DepthwiseForwardArgs)
RACCGAN_PASS(DepthwiseBackwardArgs)
RACCGAN_PASS(DepthwiseDoubleBackwardArgs)
RACCGAN_PASS(FusedArgs)
#undef RACCGAN_PASS

// The score of n images: residual [n] and feature [n], which are zero without features, and the map of `images`.
const char* anomaly_score(int64_t n, const ImageArgs& images, const FeatureArgs* features, float* residual,
                          float* feature, int device, void* stream);

// Mean and biased variance over each group's pixels, of which there is one at least, [groups, C] each; with
// moments_floats float32 numbers of scratch memory.
int64_t moments_floats(const MomentsArgs& args);
const char* moments(const MomentsArgs& args, float* scratch, float* mean, float* var, int device, void* stream);

// The gradient of <grad_mean, mean> + <grad_var, var>, like x.
const char* moments_backward(const MomentsArgs& args, const float* grad_mean, const float* grad_var, const float* mean,
                             void* grad, int device, void* stream);
}  // namespace raccgan::cuda
