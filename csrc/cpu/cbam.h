// The CPU kernels of CBAM, one set a target; see targets.h. The mathematics is in cbam.cpp,
// cbam_backward.cpp and cbam_double_backward.cpp.
//
// A sample is [P, C] in memory, P = H * W pixels of C channels each, without gaps. Everything that is not as large as x
// is float32, and so is the arithmetic.
#pragma once

#include "../ops/dtype.h"
#include "simd/integers.h"
#include "simd/targets.h"

namespace raccgan {

struct CbamShape {
  int64_t n, c, h, w;
  int64_t r;  // reduced channels, between the two layers of the MLP
  int64_t k;  // size of the spatial gate's convolution, odd
  Dtype dtype;  // float32 or bfloat16, of x, y and their gradients
};

struct CbamWeights {
  const float *reduce_weight, *reduce_bias;  // [R, C], [R]
  const float *expand_weight, *expand_bias;  // [C, R], [C]
  const float* spatial_weight;               // [2, k, k]
  float norm_weight, norm_bias, eps;
};

// What the forward pass finds out on its way, and the backward pass needs.
struct CbamSaved {
  float *average, *maximum;  // [N, C] each, over the pixels
  float* hidden;             // [N, 3, R], the MLP's hidden layer for each of them, after the ReLU, and the sum of both
  float* gate;               // [N, C], the channel gate
  float* planes;             // [N, 2, P], per pixel the max and the mean over the gated channels
  float* scores;             // [N, P], their convolution
  float* moments;            // [N, 2] for norm "instance", [1, 2] otherwise: mean and biased variance of the scores
};

// Mean and sum of squared deviations of a band of scores.
struct CbamMoments {
  double mean, squares;
};

// A tensor [N, P, C], or as much of it as there is: the samples from `first` on.
struct CbamSamples {
  const void* data;
  int64_t first;
};

struct CbamForwardArgs {
  CbamShape shape;
  CbamWeights weights;
  CbamSaved saved;
  CbamSamples x;
  void* y;               // [N, P, C], out
  float* pooled;         // [N, pieces, 2, C], each piece's sum and max over its pixels
  CbamMoments* moments;  // [N, bands]
  bool average, maximum;  // whether saved.average and saved.maximum have to be found, or were given
  int64_t moments_stride;  // from one sample's saved.moments to the next: 2, or 0 where all share them
};

// How the gradient of a pixel's score comes from what flows to its normalised score, by sample:
// d score = alpha * d normalised + beta + gamma * (score - mean).
struct CbamNormGradient {
  float alpha, beta, gamma, mean;
};

// Sums over a band of pixels: of what flows to the normalised scores, and of its product with (score - mean) / deviation.
struct CbamNormSums {
  double flow, product;
};

struct CbamBackwardArgs {
  CbamShape shape;
  CbamWeights weights;
  CbamSaved saved;
  CbamSamples x, g_y;
  void* g_x;        // [N, P, C], out
  float* flow;      // [N, P], to the normalised scores
  float* ties;      // [N, P], how many channels reach the pixel's max
  float* g_planes;  // [N, 2, P], to each of the channels that reach the max, and to each channel through the mean
  float* sums;      // [N, pieces, 3, C]: d gate, in two parts, and how many pixels reach the channel's max
  float* g_logits;  // [N, C], to the argument of the channel gate's sigmoid
  float* g_hidden;  // [N, 2, R], to the arguments of the hidden layers' ReLU
  float* g_average;  // [N, C]
  float* g_maximum;  // [N, C]
  float* tied;       // [N, C], how many pixels reach the channel's max
  float* spatial;  // [N, bands, 2, k, k], d spatial_weight by band, or null where it is not wanted
  float *g_reduce_weight, *g_reduce_bias, *g_expand_weight, *g_expand_bias;  // out
  CbamNormSums* norm_sums;               // [N, bands]
  const CbamNormGradient* norm_gradient;  // [N]
  bool channels;  // whether anything of the channel gate is wanted: it, its MLP, what it pools, or x
  bool average, maximum;  // whether they came from x, as opposed to being given
  int64_t moments_stride;
};

// The derivatives of the backward pass in the direction v, for norm "instance"; see cbam_double_backward.cpp. What is by
// sample is summed up for the weights afterwards.
struct CbamDoubleBackwardArgs {
  CbamShape shape;
  CbamWeights weights;
  CbamSaved saved;
  const void *x, *g_y, *v;  // [N, P, C] each
  void *g_g_y, *g_x;        // likewise, out
  float *v_average, *v_maximum;  // [N, C] each, what v is to them: given where they were, out otherwise
  float *g_average, *g_maximum;  // [N, C] each, out
  float* hidden;   // [N, R], the sum of both hidden layers in that direction
  float* g_logits;  // [N, 2, C], to the argument of the channel gate's sigmoid, and in that direction
  float* g_hidden;  // [N, 4, R], to the arguments of both hidden layers' ReLU, and in that direction
  float* spatial;  // [N, 2, k, k], of the convolution's weights by sample, out
  float* norm;     // [N, 2], of the norm's weight and bias by sample, out
  float *g_reduce_weight, *g_reduce_bias, *g_expand_weight, *g_expand_bias;  // out
  bool average, maximum;  // whether they came from x, as opposed to being given
};

static constexpr int64_t kCbamLanes = 16;  // of any target's vectors

// A sample is cut into pieces of pixels, its planes into bands of rows, by the shape alone: never by threads or
// hardware, so that a sum over pieces is always the same sum.
constexpr int64_t kCbamPiece = 1024;  // pixels at most
static constexpr int64_t pixels_a_piece(const CbamShape& s) {
  return most(kCbamLanes, least(kCbamPiece, 32768 / s.c / kCbamLanes * kCbamLanes));
}
static constexpr int64_t pieces(const CbamShape& s) { return (s.h * s.w + pixels_a_piece(s) - 1) / pixels_a_piece(s); }
static constexpr int64_t rows_a_band(const CbamShape& s) { return least(s.h, most(8, kCbamPiece / s.w)); }
static constexpr int64_t bands(const CbamShape& s) { return (s.h + rows_a_band(s) - 1) / rows_a_band(s); }

// A plane's band in scratch memory, with what surrounds it (cbam_planes.h).
static constexpr int64_t band_floats(const CbamShape& s) {
  return (rounded_up(rows_a_band(s), 4) + s.k - 1) * (rounded_up(s.w, 2 * kCbamLanes) + s.k - 1);
}

// float32 that a thread needs: a band of three planes, and weights.
static constexpr int64_t scratch_floats(const CbamShape& s) { return 3 * band_floats(s) + 2 * s.k * s.k; }

// The same for the second gradients of a sample: all that is as large as its channels or its pixels, a band of three
// planes, and weights.
static constexpr int64_t double_backward_floats(const CbamShape& s) {
  return 7 * rounded_up(s.c, kCbamLanes) + 12 * rounded_up(s.h * s.w, kCbamLanes) + 3 * band_floats(s) + 4 * s.k * s.k;
}

// Each function does begin <= i < end of its tasks, which a caller may split over threads as it likes. Tasks are
// samples, pieces of samples [N, pieces] or bands of samples [N, bands].
#define RACCGAN_DECLARE(target, unused)                                                                            \
  namespace target {                                                                                               \
  /* to[n - to_first, p, c] = from[n, c, p], by pieces of all samples */                                           \
  void cbam_to_channels_last(const CbamShape& shape, const void* from, void* to, int64_t to_first, int64_t begin,  \
                             int64_t end);                                                                         \
  void cbam_pool(const CbamForwardArgs& args, int64_t begin, int64_t end);                   /* by pieces */       \
  void cbam_gate(const CbamForwardArgs& args, int64_t begin, int64_t end);                   /* by samples */      \
  void cbam_gather(const CbamForwardArgs& args, int64_t begin, int64_t end);                 /* by pieces */       \
  void cbam_convolve(const CbamForwardArgs& args, float* scratch, int64_t begin, int64_t end); /* by bands */      \
  void cbam_apply(const CbamForwardArgs& args, int64_t begin, int64_t end);                  /* by pieces */       \
  void cbam_flow(const CbamBackwardArgs& args, int64_t begin, int64_t end);                  /* by pieces */       \
  void cbam_norm_sums(const CbamBackwardArgs& args, int64_t begin, int64_t end);             /* by bands */        \
  void cbam_convolve_back(const CbamBackwardArgs& args, float* scratch, int64_t begin, int64_t end); /* by bands */ \
  void cbam_gather_back(const CbamBackwardArgs& args, int64_t begin, int64_t end);           /* by pieces */       \
  void cbam_gate_back(const CbamBackwardArgs& args, int64_t begin, int64_t end);             /* by samples */      \
  void cbam_apply_back(const CbamBackwardArgs& args, int64_t begin, int64_t end);            /* by pieces */       \
  /* by rows of the MLP's weights: R of the first layer, then C of the second */                                   \
  void cbam_weights_back(const CbamBackwardArgs& args, int64_t begin, int64_t end);                                \
  void cbam_double_backward(const CbamDoubleBackwardArgs& args, float* scratch, int64_t begin, int64_t end); /* by samples */ \
  void cbam_weights_double_back(const CbamDoubleBackwardArgs& args, int64_t begin, int64_t end); /* by rows, likewise */ \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE

}  // namespace raccgan
