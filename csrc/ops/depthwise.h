// The depthwise half of a depthwise-separable convolution, with the norm, ReLU and resizing around it, and its
// derivatives: arguments of the kernels on a CPU and on a GPU.
//
//     h = relu(x) if pre_relu else x
//     z = (h - mean) / sqrt(var + eps) over each sample's channel if normalise else h
//     a = relu(z * scale + shift)                                                   (either part optional)
//     y = L a, the depthwise convolution of a by w, after nearest x2 (up) or before an average over 2 x 2 (down)
//
// With P u = u - mean(u) - z mean(u z) and r = 1 / sqrt(var + eps), over the pixels of a sample's channel:
//
//     backward         q = [a > 0] L^T g,  grad_x = r scale P q,  grad_shift = sum q,  grad_scale = sum q z,
//                      grad_w = a correlated with g
//     double backward  u = r P t,  s = scale [a > 0] u,  Q = scale q,
//                      grad_g = L s,  grad_w = s correlated with g,  grad_scale = sum q u,
//                      grad_x = -r^2 (A z + mean(Q z) P t + mean(t z) P Q),
//                      A = mean(t Q) - mean(t) mean(Q) - mean(t z) mean(Q z)
//
// Without the norm, r = 1, P u = u, and the double backward has no grad_x. A ReLU before the norm multiplies t, and
// what leaves as grad_x, by [x > 0].
//
// Zero padding k / 2. Images are [N, H, W, C] in memory, without gaps. C headers only, see cpu/simd/targets.h.
#pragma once

#include "dtype.h"

namespace raccgan {
enum class Resize : int32_t { kNone, kUp, kDown };

struct DepthwiseLayer {
  int64_t n, c, h, w;  // of x
  int64_t k;           // 3, 5 or 7
  Resize resize;
  bool pre_relu, normalise, relu;
  float eps;
  Dtype dtype;          // of x, y and their gradients; everything else is float32, and so are all sums
  const float* scale;   // [N, C], or null, and then shift is null too
  const float* shift;   // [N, C]
  const float* weight;  // [C, k, k]; for the CPU kernels as their pack_weights orders it

  // Height or width of y. An average over 2 x 2 leaves an odd row or column out.
  int64_t out(int64_t size) const {
    return resize == Resize::kUp ? 2 * size : resize == Resize::kDown ? size / 2 : size;
  }
};

struct DepthwiseForwardArgs {
  DepthwiseLayer layer;
  const void* x;
  void* y;  // out
};

// Gradients for the gradient g of y. Null where not needed.
struct DepthwiseBackwardArgs {
  DepthwiseLayer layer;
  const void *g, *x;
  void* grad_x;                    // out
  float* grad_w;                   // [C, k, k], out; of the CPU kernels [chunks, k * k, C], to be added up
  float *grad_scale, *grad_shift;  // [N, C], out
};

// Gradients of <t, grad_x> for a t like x, as a gradient penalty needs them. Null where not needed.
struct DepthwiseDoubleBackwardArgs {
  DepthwiseLayer layer;
  const void *t, *g, *x;
  void* grad_g;       // like y, out
  void* grad_x;       // out, and only where x is normalised
  float* grad_w;      // as above
  float* grad_scale;  // [N, C], out
};

// Resizing, folded into the weights: v [k + 1, k + 1] sums w over its 2 x 2 neighbours. With stride 2 the convolution
// by v is that by w and the average after it. Nearest x2 and the convolution are its transpose, by the flipped w.

// Taps a side of v, or of w where nothing is resized.
RACCGAN_HOST_DEVICE static constexpr int64_t taps(const DepthwiseLayer& s) {
  return s.resize == Resize::kNone ? s.k : s.k + 1;
}

// Of all taps of v.
RACCGAN_HOST_DEVICE static constexpr float fold_factor(Resize resize) { return resize == Resize::kDown ? 0.25f : 1; }

namespace {
// Tap (row, column) of v, for one channel's w [k, k]. A sum is a float, or a vector of floats.
template <class Sum>
RACCGAN_HOST_DEVICE Sum folded(const DepthwiseLayer& s, const Sum* w, int64_t row, int64_t column) {
  Sum sum = {};
  for (int64_t r = 0; r < 2; ++r) {
    for (int64_t c = 0; c < 2; ++c) {
      const int64_t i = row - r, j = column - c;
      if (i < 0 || i >= s.k || j < 0 || j >= s.k) continue;
      sum += w[s.resize == Resize::kUp ? s.k * s.k - 1 - (i * s.k + j) : i * s.k + j];
    }
  }
  return sum * fold_factor(s.resize);
}

// The transpose of `folded`, without its factor: adds the taps of v, stride apart, that have a part of tap `tap` of w.
template <class Tap, class Sum>
RACCGAN_HOST_DEVICE void add_unfolded(const DepthwiseLayer& s, int64_t tap, const Tap* v, int64_t stride, Sum& sum) {
  const int64_t at = s.resize == Resize::kUp ? s.k * s.k - 1 - tap : tap, box = s.resize == Resize::kNone ? 1 : 2;
  for (int64_t r = 0; r < box; ++r) {
    for (int64_t c = 0; c < box; ++c) sum += v[((at / s.k + r) * taps(s) + at % s.k + c) * stride];
  }
}
}  // namespace

// Output parities of an upsampling convolution have (k + 1) / 2 taps each, so that none multiplies a zero: tap t is
// v[last_tap - 2t], and meets input j + first_input + t for output 2j + parity.
RACCGAN_HOST_DEVICE static constexpr int last_tap(int k, int parity) { return (parity + k / 2) % 2 == 1 ? k : k - 1; }
RACCGAN_HOST_DEVICE static constexpr int first_input(int k, int parity) {
  return (parity + k / 2 - last_tap(k, parity)) / 2;
}
}  // namespace raccgan
