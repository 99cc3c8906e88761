// The arguments of CBAM's kernels, on a CPU and on a GPU. The mathematics is in cpu/cbam/*.cpp. A sample is [P, C] in
// memory, P = H * W pixels of C channels each, without gaps. Everything that is smaller than x is float32, and so is
// the arithmetic. All pointers are into the memory of x's device. C headers only, see cpu/simd/targets.h.
#pragma once

#include "dtype.h"

namespace raccgan {
struct CbamShape {
  int64_t n, c, h, w;  // c, h and w are not zero
  int64_t r;  // hidden channels of the MLP
  int64_t k;  // size of the spatial gate's convolution, odd
  Dtype dtype;  // of x, y and their gradients
};

struct CbamWeights {
  const float *reduce_weight, *reduce_bias;  // [R, C], [R]
  const float *expand_weight, *expand_bias;  // [C, R], [C]
  const float* spatial_weight;  // [2, k, k]
  const float *norm_weight, *norm_bias;  // [1] each
  float eps;
};

// Which moments the spatial gate's norm takes: each sample's own, those of all samples together, or given ones.
enum class CbamNorm : int32_t { kInstance, kBatch, kFixed };

// The results of the forward pass that the backward pass reads, one after the other in memory. `gate`, `average` and
// `maximum` come first: their rows then allow 16-byte loads wherever x's pixels do.
struct CbamSaved {
  float* gate;  // [N, C], the channel gate
  float *average, *maximum;  // [N, C] each, over the pixels
  float* hidden;  // [N, 3, R], the MLP's hidden layer for each of them, after the ReLU, and the sum of both
  float* planes;  // [N, 2, P], per pixel the max and the mean over the gated channels
  float* scores;  // [N, P], their convolution
  float* moments;  // [N, 2] for kInstance, [1, 2] otherwise: mean and biased variance of the scores
};

// What every pass is given. Each pass adds its own tensors.
struct CbamArgs {
  CbamShape shape;
  CbamWeights weights;
  CbamSaved saved;
  CbamNorm norm;
};

// The gradients of the backward pass: x's in its dtype, the others float32. Null where not needed.
struct CbamGradients {
  void* x;  // [N, P, C]
  float *reduce_weight, *reduce_bias, *expand_weight, *expand_bias;
  float* spatial_weight;
  float *norm_weight, *norm_bias;
  float *mean, *var;  // of given moments
};

struct CbamForwardArgs : CbamArgs {
  const float *given_mean, *given_var;  // [1] each, for kFixed
  const void* x;
  void* y;            // out
  float *mean, *var;  // the moments once more, out, where they were not given
  bool x_planar;      // x is [N, C, P] in memory, which the CPU kernels read too
};

struct CbamBackwardArgs : CbamArgs {
  const void *x, *grad_y;
  const float *grad_mean, *grad_var;  // of the moments, or null
  CbamGradients gradients;            // out
  bool x_planar, grad_y_planar;
};

// Of <v, gradient of x>, for kInstance, on a CPU. No gradient is null, but for those of given moments.
struct CbamDoubleBackwardArgs : CbamArgs {
  const void *x, *grad_y, *v;
  void* grad_grad_y;        // out
  CbamGradients gradients;  // out
};

static constexpr int64_t pixels(const CbamShape& s) { return s.h * s.w; }
static constexpr int64_t moments(const CbamShape& s, CbamNorm norm) { return norm == CbamNorm::kInstance ? s.n : 1; }

// Floats of CbamSaved.
static constexpr int64_t saved_floats(const CbamShape& s, CbamNorm norm) {
  return s.n * (3 * s.c + 3 * s.r + 3 * pixels(s)) + 2 * moments(s, norm);
}

static inline CbamSaved saved_in(const CbamShape& s, float* memory) {
  const int64_t nc = s.n * s.c, np = s.n * pixels(s);
  float *const hidden = memory + 3 * nc, *const planes = hidden + s.n * 3 * s.r, *const scores = planes + 2 * np;
  return {memory, memory + nc, memory + 2 * nc, hidden, planes, scores, scores + np};
}

// Mean and variance for sample n.
RACCGAN_HOST_DEVICE static inline const float* moments_of(const CbamArgs& args, int64_t n) {
  return args.saved.moments + (args.norm == CbamNorm::kInstance ? 2 * n : 0);
}

// How the scores of a sample become its spatial gate: sigmoid(scale * score + shift).
struct CbamSpatialGate {
  float scale, shift;
};

RACCGAN_HOST_DEVICE static inline CbamSpatialGate spatial_gate(const CbamArgs& args, int64_t n) {
  const float* const moments = moments_of(args, n);
  const float scale = *args.weights.norm_weight / __builtin_sqrtf(moments[1] + args.weights.eps);
  return {scale, *args.weights.norm_bias - moments[0] * scale};
}

static constexpr bool needs_mlp(const CbamGradients& g) {
  return g.reduce_weight || g.reduce_bias || g.expand_weight || g.expand_bias;
}

// Whether the pass has to go back through the channel gate.
static constexpr bool needs_channel_gate(const CbamGradients& g) { return g.x || needs_mlp(g); }
}  // namespace raccgan
