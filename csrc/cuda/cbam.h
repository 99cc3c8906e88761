// The CUDA kernels of CBAM, for their bindings: no CUDA header, so that any C++ compiler takes it. The mathematics is in
// cpu/cbam.cpp and cpu/cbam_backward.cpp.
//
// A sample is [P, C] in memory, P = H * W pixels of C channels each, without gaps. Everything that is not as large as x
// is float32, and so is the arithmetic. All pointers are into the device's memory.
#pragma once

#include <stdint.h>

#include "../ops/dtype.h"

namespace raccgan {
namespace cuda {

struct CbamShape {
  int64_t n, c, h, w;  // c, h and w are not zero
  int64_t r;           // reduced channels, between the two layers of the MLP
  int64_t k;           // size of the spatial gate's convolution, odd
  Dtype dtype;         // of x, y and their gradients

  int64_t pixels() const { return h * w; }
};

struct CbamWeights {
  const float *reduce_weight, *reduce_bias;  // [R, C], [R]
  const float *expand_weight, *expand_bias;  // [C, R], [C]
  const float* spatial_weight;               // [2, k, k]
  const float *norm_weight, *norm_bias;      // [1] each
  float eps;
};

// What was given instead of being found from x, or null.
struct CbamGiven {
  const float *average, *maximum;  // [N, C] each
  const float *mean, *var;         // [1] each
};

// What the forward pass finds out on its way, and the backward pass needs, one after the other in memory: what is read
// by channel comes first, so that its rows allow 16-byte loads wherever x's pixels do.
struct CbamSaved {
  float* gate;               // [N, C], the channel gate
  float *average, *maximum;  // [N, C] each, over the pixels
  float* hidden;             // [N, 3, R], the MLP's hidden layer for each of them, after the ReLU, and the sum of both
  float* planes;             // [N, 2, P], per pixel the max and the mean over the gated channels
  float* scores;             // [N, P], their convolution
  float* moments;            // [N, 2] for norm "instance", [1, 2] otherwise: mean and biased variance of the scores

  CbamSaved(const CbamShape& s, float* at) : gate(at) {
    average = gate + s.n * s.c;
    maximum = average + s.n * s.c;
    hidden = maximum + s.n * s.c;
    planes = hidden + s.n * 3 * s.r;
    scores = planes + s.n * 2 * s.pixels();
    moments = scores + s.n * s.pixels();
  }
};

struct CbamForwardArgs {
  CbamShape shape;
  CbamWeights weights;
  CbamGiven given;
  CbamSaved saved;
  bool batch;  // whether the moments are over all samples
  const void* x;
  void* y;            // out
  float *mean, *var;  // the moments once more, out, where they were not given
};

// Gradients, all but x's float32. Null where not wanted.
struct CbamBackwardArgs {
  CbamShape shape;
  CbamWeights weights;
  CbamGiven given;
  CbamSaved saved;
  bool batch;
  const void *x, *g_y;
  const float *g_mean, *g_var;  // of the moments, or null
  void* g_x;
  float *g_average, *g_maximum;  // [N, C] each
  float *g_reduce_weight, *g_reduce_bias, *g_expand_weight, *g_expand_bias;
  float* g_spatial_weight;
  float *g_norm_weight, *g_norm_bias, *g_given_mean, *g_given_var;  // [1] each
};

// Each queues one pass on `stream` (a cudaStream_t) of `device`, with so many float32 numbers of scratch memory as
// its _floats says, and returns null, or CUDA's message if a launch failed.
int64_t cbam_forward_floats(const CbamForwardArgs& args);
const char* cbam_forward(const CbamForwardArgs& args, float* scratch, int device, void* stream);

int64_t cbam_backward_floats(const CbamBackwardArgs& args);
const char* cbam_backward(const CbamBackwardArgs& args, float* scratch, int device, void* stream);

}  // namespace cuda
}  // namespace raccgan
