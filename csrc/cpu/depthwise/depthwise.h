// The CPU kernels of the depthwise half of a depthwise-separable convolution with the norm, activation and resizing
// around it, and of its first and second derivatives; one set a target, see targets.h.
//
//     h = relu(x) if rectify_first else x
//     z = (h - mean) / sqrt(var + eps) over each sample's channel if normalise else h
//     a = relu(z * scale + shift)                                                  (either part optional)
//     y = the depthwise convolution of a by w, after nearest x2 (up) or before an average over 2 x 2 (down), + bias
//
// Zero padding k / 2, k of 3, 5 or 7. Everything is [N, H, W, C] in memory, without gaps.
#pragma once

#include "../../ops/dtype.h"
#include "../simd/integers.h"
#include "../simd/targets.h"

namespace raccgan {

enum class Resize : int32_t { kPlain, kUp, kDown };

struct DepthwiseLayer {
  int64_t n, c, h, w;  // of x
  int64_t k;
  Resize resize;
  bool rectify_first, normalise, rectify;
  float eps;
  Dtype dtype;         // float32 or bfloat16, of x, y and their gradients; the rest and all sums are float32
  const float* scale;  // [N, C], or null, and then shift is null too
  const float* shift;  // [N, C]

  // Of y. An average over 2 x 2 leaves an odd row or column out.
  int64_t out(int64_t side) const {
    return resize == Resize::kUp ? 2 * side : resize == Resize::kDown ? side / 2 : side;
  }
};

struct ForwardArgs {
  DepthwiseLayer layer;
  const void* x;
  const float* packed;  // the weights as pack_weights lays them out
  const float* bias;    // [C], added to y, or null
  int64_t first, last;  // which rows of each sample's y are made: first <= row < last; all, where x is normalised
  void* y;              // out; those rows
};

// Gradients for the gradient g of y. Null where not wanted.
struct BackwardArgs {
  DepthwiseLayer layer;
  const void *g, *x;
  const float* packed;
  void* grad_x;                    // out
  float* partial_w;                // [pieces, k * k, C], out: what each piece adds to the gradient of w
  float *grad_scale, *grad_shift;  // [N, C], out
};

// Gradients of <t, grad_x> for a t like x: what a gradient penalty sends back. Null where not wanted.
struct DoubleBackwardArgs {
  DepthwiseLayer layer;
  const void *t, *g, *x;
  const float* packed;
  void* grad_g;       // like y, out
  void* grad_x;       // out; zero where x is not normalised
  float* partial_w;   // as above
  float* grad_scale;  // [N, C], out
};

// The batch is cut into runs of samples by the shape alone, never by threads or hardware, so that a sum over pieces is
// always the same sum.
constexpr int64_t kMostLanes = 16;  // of any target's vectors
static constexpr int64_t samples_a_piece(const DepthwiseLayer& s) {
  return most(1024 / most(1, s.h * s.w), s.c < kMostLanes ? kMostLanes : 1);
}
static constexpr int64_t pieces(const DepthwiseLayer& s) {
  return rounded_up(s.n, samples_a_piece(s)) / samples_a_piece(s);
}

// `tasks` counts the pieces of work of a call; each pass does begin <= i < end of them, which a caller may split over
// threads as it likes, with so many floats of scratch memory, all zero and aligned to 64 bytes, for each. pack_weights
// reads float32 w [C, 1, k, k] and writes packed_floats of them.
#define RACCGAN_DECLARE(target, unused)                                                                   \
  namespace target {                                                                                      \
  int64_t packed_floats(const DepthwiseLayer& layer);                                                     \
  void pack_weights(const DepthwiseLayer& layer, const float* w, float* packed);                          \
  int64_t tasks(const DepthwiseLayer& layer);                                                             \
  int64_t forward_scratch(const DepthwiseLayer& layer, int64_t rows);                                     \
  int64_t backward_scratch(const DepthwiseLayer& layer);                                                  \
  int64_t double_backward_scratch(const DepthwiseLayer& layer);                                           \
  void forward(const ForwardArgs& args, float* scratch, int64_t begin, int64_t end);                      \
  void backward(const BackwardArgs& args, float* scratch, int64_t begin, int64_t end);                    \
  void double_backward(const DoubleBackwardArgs& args, float* scratch, int64_t begin, int64_t end);       \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE

}  // namespace raccgan
