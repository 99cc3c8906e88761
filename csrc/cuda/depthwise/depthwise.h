// The CUDA kernels of the depthwise half of a depthwise-separable convolution with the norm, activation and resizing
// around it, and of its first and second derivatives, for their bindings: no CUDA header, so that any C++ compiler
// takes it. The mathematics is that of cpu/depthwise_separable.h and .cpp.
#pragma once

#include <stdint.h>

#include "../../ops/dtype.h"

namespace raccgan {
namespace cuda {

enum class Resize : int32_t { kPlain, kUp, kDown };

// Everything is [N, H, W, C] in memory, without gaps.
struct DepthwiseLayer {
  int64_t n, c, h, w;  // of x; none is zero
  int64_t k;           // 3, 5 or 7
  Resize resize;
  bool rectify_first, normalise, rectify;
  float eps;
  Dtype dtype;         // of x, y and their gradients; the rest and all sums are float32
  const float* scale;  // [N, C], or null, and then shift is null too
  const float* shift;  // [N, C]
  const float* weight;  // [C, k, k]

  // Of y. An average over 2 x 2 leaves an odd row or column out.
  int64_t out(int64_t side) const {
    return resize == Resize::kUp ? 2 * side : resize == Resize::kDown ? side / 2 : side;
  }
};

struct ForwardArgs {
  DepthwiseLayer layer;
  const void* x;
  void* y;  // out
};

// The forward pass with the matrix product, of depthwise_separable_fused.cu.
struct FusedArgs {
  DepthwiseLayer layer;
  int64_t d;  // channels of y, not zero
  const void* x;
  const void* pointwise;         // [D, C], of the layer's dtype
  const float* bias;             // [D], or null
  const void* residual;          // like y, or null
  bool tf32;                     // whether float32 may be rounded to it in the product
  void* y;                       // [N, H', W', D], out
};

// Gradients for the gradient g of y. Null where not wanted.
struct BackwardArgs {
  DepthwiseLayer layer;
  const void *g, *x;
  void* grad_x;                    // out
  float* grad_w;                   // [C, k, k], out
  float *grad_scale, *grad_shift;  // [N, C], out
};

// Gradients of <t, grad_x> for a t like x: what a gradient penalty sends back. Null where not wanted.
struct DoubleBackwardArgs {
  DepthwiseLayer layer;
  const void *t, *g, *x;
  void* grad_g;       // like y, out
  void* grad_x;       // out, and only where x is normalised
  float* grad_w;      // as above
  float* grad_scale;  // [N, C], out
};

// Each queues one pass on `stream` (a cudaStream_t) of `device`, with so many float32 numbers of scratch memory as
// its _floats says, and returns null, or CUDA's message if a launch failed.
int64_t forward_floats(const ForwardArgs& args);
const char* forward(const ForwardArgs& args, float* scratch, int device, void* stream);

int64_t fused_floats(const FusedArgs& args);
const char* fused(const FusedArgs& args, float* scratch, int device, void* stream);

int64_t backward_floats(const BackwardArgs& args);
const char* backward(const BackwardArgs& args, float* scratch, int device, void* stream);

int64_t double_backward_floats(const DoubleBackwardArgs& args);
const char* double_backward(const DoubleBackwardArgs& args, float* scratch, int device, void* stream);

}  // namespace cuda
}  // namespace raccgan
