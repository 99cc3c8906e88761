// The CUDA kernels of ops/depthwise.h, for their bindings: no CUDA header, so that any C++ compiler takes it.
#pragma once

#include "../../ops/depthwise.h"

namespace raccgan::cuda {
// The forward pass together with the matrix product, in one kernel: y = (L a) pointwise^T + bias + residual.
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

// Each queues one pass on `stream` (a cudaStream_t) of `device`, with _floats float32 numbers of scratch memory.
// Returns null, or CUDA's message if a launch failed. No size of a layer is zero.
int64_t forward_floats(const DepthwiseForwardArgs& args);
const char* forward(const DepthwiseForwardArgs& args, float* scratch, int device, void* stream);

int64_t fused_floats(const FusedArgs& args);
const char* fused(const FusedArgs& args, float* scratch, int device, void* stream);

int64_t backward_floats(const DepthwiseBackwardArgs& args);
const char* backward(const DepthwiseBackwardArgs& args, float* scratch, int device, void* stream);

int64_t double_backward_floats(const DepthwiseDoubleBackwardArgs& args);
const char* double_backward(const DepthwiseDoubleBackwardArgs& args, float* scratch, int device, void* stream);
}  // namespace raccgan::cuda
