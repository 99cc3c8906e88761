// The CPU kernels of CBAM, one set a target; see simd/targets.h.
#pragma once

#include "../../ops/cbam.h"
#include "../simd/targets.h"

namespace raccgan {
// Mean and sum of squared deviations of a tile of scores.
struct CbamMoments {
  double mean, squares;
};

// A tensor [N, P, C], or as much of it as there is: the samples from `first` on.
struct CbamSamples {
  const void* data;
  int64_t first;
};

struct CbamForwardArgs : CbamArgs {
  CbamSamples x;
  void* y;               // [N, P, C], out
  float* pooled;         // [N, chunks, 2, C], each chunk's sum and max over its pixels
  CbamMoments* moments;  // [N, tiles]
};

// How the gradient of a pixel's score comes from what flows to its normalised score, by sample:
// d score = alpha * d normalised + beta + gamma * (score - mean).
struct CbamNormGradient {
  float alpha, beta, gamma, mean;
};

// Sums over a tile of pixels: of what flows to the normalised scores, and of its product with those.
struct CbamNormSums {
  double flow, product;
};

struct CbamBackwardArgs : CbamArgs {
  CbamSamples x, grad_y;
  CbamGradients gradients;  // out
  float* flow;       // [N, P], to the normalised scores
  float* ties;       // [N, P], how many channels reach the pixel's max
  float* grad_planes;  // [N, 2, P], to each of the channels that reach the max, and to each channel through the mean
  float* sums;  // [N, chunks, 3, C]: d gate, in two parts, and how many pixels reach the channel's max
  float* grad_logits;  // [N, C], to the argument of the channel gate's sigmoid
  float* grad_hidden;  // [N, 2, R], to the arguments of the hidden layers' ReLU
  float *grad_average, *grad_maximum;  // [N, C] each
  float* tied;  // [N, C], how many pixels reach the channel's max
  float* grad_spatial;  // [N, tiles, 2, k, k], d spatial_weight by tile, or null where it is not needed
  CbamNormSums* norm_sums;  // [N, tiles]
  const CbamNormGradient* norm_gradient;  // [N]
};

// The derivatives of the backward pass in the direction v, for norm "instance"; see double_backward.cpp. Gradients of
// the spatial weight and of the norm are by sample: the caller adds them up.
struct CbamDoubleBackwardArgs : CbamArgs {
  const void *x, *grad_y, *v;  // [N, P, C] each
  void* grad_grad_y;  // likewise, out
  CbamGradients gradients;  // out, all but the spatial weight's and the norm's
  float *v_average, *v_maximum;  // [N, C] each, the derivatives of average and maximum in the direction v
  float *grad_average, *grad_maximum;  // [N, C] each
  float* hidden;  // [N, R], the sum of both hidden layers in that direction
  float* grad_logits;  // [N, 2, C], to the argument of the channel gate's sigmoid, and in that direction
  float* grad_hidden;  // [N, 4, R], to the arguments of both hidden layers' ReLU, and in that direction
  float* grad_spatial;  // [N, 2, k, k], of the convolution's weights by sample, out
  float* grad_norm;  // [N, 2], of the norm's weight and bias by sample, out
};

static constexpr int64_t kCbamLanes = 16;  // of any target's vectors

// A sample is cut into chunks of pixels, its planes into tiles of rows, by the shape alone: never by threads or
// hardware, so that a sum over chunks is always the same sum.
constexpr int64_t kCbamChunk = 1024;  // pixels at most
static constexpr int64_t pixels_per_chunk(const CbamShape& s) {
  return most(kCbamLanes, least(kCbamChunk, 32768 / s.c / kCbamLanes * kCbamLanes));
}
static constexpr int64_t chunks(const CbamShape& s) {
  return (s.h * s.w + pixels_per_chunk(s) - 1) / pixels_per_chunk(s);
}
static constexpr int64_t rows_per_tile(const CbamShape& s) { return least(s.h, most(8, kCbamChunk / s.w)); }
static constexpr int64_t tiles(const CbamShape& s) { return (s.h + rows_per_tile(s) - 1) / rows_per_tile(s); }

// A plane's tile in scratch memory, with what surrounds it (planes.h).
static constexpr int64_t tile_floats(const CbamShape& s) {
  return (rounded_up(rows_per_tile(s), 4) + s.k - 1) * (rounded_up(s.w, 2 * kCbamLanes) + s.k - 1);
}

// float32 that a thread needs: a tile of three planes, and weights.
static constexpr int64_t scratch_floats(const CbamShape& s) { return 3 * tile_floats(s) + 2 * s.k * s.k; }

// The same for the second gradients of a sample: all that is as large as its channels or its pixels, a tile of three
// planes, and weights.
static constexpr int64_t double_backward_floats(const CbamShape& s) {
  return 7 * rounded_up(s.c, kCbamLanes) + 12 * rounded_up(s.h * s.w, kCbamLanes) + 3 * tile_floats(s) + 4 * s.k * s.k;
}

// Each function does begin <= i < end of its tasks, which a caller may split over threads as it likes. Tasks are
// samples, chunks of samples [N, chunks] or tiles of samples [N, tiles].
#define RACCGAN_DECLARE(target, unused)                                                                             \
  namespace target {                                                                                                \
  /* to[n - to_first, p, c] = from[n, c, p], by chunks of all samples */                                            \
  void cbam_to_channels_last(const CbamShape& shape, const void* from, void* to, int64_t to_first, int64_t begin,   \
                             int64_t end);                                                                          \
  void cbam_pool(const CbamForwardArgs& args, int64_t begin, int64_t end); /* by chunks */                          \
  void cbam_gate(const CbamForwardArgs& args, int64_t begin, int64_t end); /* by samples */                         \
  void cbam_gather(const CbamForwardArgs& args, int64_t begin, int64_t end); /* by chunks */                        \
  void cbam_convolve(const CbamForwardArgs& args, float* scratch, int64_t begin, int64_t end); /* by tiles */       \
  void cbam_apply(const CbamForwardArgs& args, int64_t begin, int64_t end); /* by chunks */                         \
  void cbam_flow(const CbamBackwardArgs& args, int64_t begin, int64_t end); /* by chunks */                         \
  void cbam_norm_sums(const CbamBackwardArgs& args, int64_t begin, int64_t end); /* by tiles */                     \
  void cbam_convolve_back(const CbamBackwardArgs& args, float* scratch, int64_t begin, int64_t end); /* by tiles */ \
  void cbam_gather_back(const CbamBackwardArgs& args, int64_t begin, int64_t end); /* by chunks */                  \
  void cbam_gate_back(const CbamBackwardArgs& args, int64_t begin, int64_t end); /* by samples */                   \
  void cbam_apply_back(const CbamBackwardArgs& args, int64_t begin, int64_t end); /* by chunks */                   \
  /* by rows of the MLP's weights: R of the first layer, then C of the second */                                    \
  void cbam_weights_back(const CbamBackwardArgs& args, int64_t begin, int64_t end);                                 \
  void cbam_double_backward(const CbamDoubleBackwardArgs& args, float* scratch, int64_t begin,                      \
                            int64_t end); /* by samples */                                                          \
  void cbam_weights_double_back(const CbamDoubleBackwardArgs& args, int64_t begin,                                  \
                                int64_t end); /* by rows, likewise */                                               \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE
}  // namespace raccgan
