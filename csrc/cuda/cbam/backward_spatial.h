// CBAM's backward kernels from y to the planes, through the spatial gate and its norm; see backward.cu.
#pragma once

#include "pixels.h"

namespace raccgan::cuda { namespace {
// The pass with its scratch memory.
struct Backward : CbamBackwardArgs {
  Scratch scratch;
  int64_t np = shape.n * pixels(shape), nc = shape.n * shape.c;
  // [N, 2], over a sample: of what flows to the normalised scores, and of that times them.
  double* norm_sums = reinterpret_cast<double*>(scratch.take(4 * shape.n));
  float* norm_gradient = scratch.take(3 * shape.n);  // [N, 3]: alpha, beta, gamma
  float* flow = scratch.take(np);  // [N, P]
  float* ties = scratch.take(np);  // [N, P], how many channels reach the pixel's max
  float* d_scores = scratch.take(np);  // [N, P]
  float* d_planes = scratch.take(2 * np);  // [N, 2, P], e_max and e_mean
  float* sums = scratch.take(2 * nc * ceiling(pixels(shape), kTilePixels));  // [N, tiles, 2, C]: d gate, and ties
  float* tied = scratch.take(nc);  // [N, C], how many pixels reach the channel's max
  float *d_average = scratch.take(nc), *d_max = scratch.take(nc);  // [N, C]
  float* d_logits = scratch.take(nc);  // [N, C], to the argument of the channel gate's sigmoid
  float* d_hidden = scratch.take(2 * shape.n * shape.r);  // [N, 2, R], to the arguments of the hidden layers' ReLU
  float* d_spatial = scratch.take(2 * shape.n * shape.k * shape.k);  // [N, 2, k, k]

  Backward(const CbamBackwardArgs& args, float* memory) : CbamBackwardArgs(args), scratch{memory} {}
};

template <class T, int V> __global__ void __launch_bounds__(kThreads) find_flow(Backward args, Range range, int group) {
  const CbamShape& s = args.shape;
  const SharedPixel at{s, range, group};
  const float* const gate = args.saved.gate + at.n * s.c;
  const float largest = args.saved.planes[at.in_plane(0)];
  float flow = 0.0f, ties = 0.0f;
#pragma unroll 1
  for (int64_t c = at.member * V; c < s.c; c += group * V) {
    float v[V], g[V], channel[V];
    load<T, V>(args.x, at.at * s.c + c, v);
    load<T, V>(args.grad_y, at.at * s.c + c, g);
    load_floats(gate + c, channel);
    for (int i = 0; i < V; ++i) {
      const float u = v[i] * channel[i];
      flow = fmaf(g[i], u, flow);
      ties += u == largest ? 1.0f : 0.0f;
    }
  }
  flow = sum_over_group(flow, group);
  ties = sum_over_group(ties, group);
  if (at.member != 0 || !at.there) return;
  const float open = gated(spatial_gate(args, at.n), args.saved.scores[at.at]);
  args.flow[at.at] = flow * open * (1.0f - open);
  args.ties[at.at] = ties;
}

// A block has a sample.
__global__ void __launch_bounds__(kThreads) sum_norm(Backward args, Range range) {
  const CbamShape& s = args.shape;
  const int64_t n = range.first + blockIdx.x, pixels = s.h * s.w;
  const float* const moments = moments_of(args, n);
  double flow = 0.0, product = 0.0;
  for (int64_t p = n * pixels + threadIdx.x; p < (n + 1) * pixels; p += kThreads) {
    flow += args.flow[p];
    product += static_cast<double>(args.flow[p]) * (args.saved.scores[p] - moments[0]);
  }
  flow = add_block(flow);
  product = add_block(product);
  if (threadIdx.x != 0) return;
  args.norm_sums[2 * n] = flow;
  args.norm_sums[2 * n + 1] = product / sqrt(static_cast<double>(moments[1]) + args.weights.eps);
}

// The gradient of the norm's argument, for the samples of a block that share moments; the formula is that of join_norm
// in cpu/cbam/backward.cpp.
__global__ void __launch_bounds__(kThreads) join_norm(Backward args, Range range, int64_t samples) {
  const int64_t first = range.first + blockIdx.x;
  double flow = 0.0, product = 0.0;
  for (int64_t n = first + threadIdx.x; n < first + samples; n += kThreads) {
    flow += args.norm_sums[2 * n];
    product += args.norm_sums[2 * n + 1];
  }
  flow = add_block(flow);
  product = add_block(product);
  const float* const moments = moments_of(args, first);
  const double over = 1.0 / sqrt(static_cast<double>(moments[1]) + args.weights.eps);
  const double alpha = *args.weights.norm_weight * over;
  double beta = 0.0, gamma = 0.0;
  if (args.norm != CbamNorm::kFixed) {
    const double count = static_cast<double>(samples * args.shape.h * args.shape.w);
    beta = (args.grad_mean ? args.grad_mean[first] / count : 0.0) - alpha * flow / count;
    gamma = (args.grad_var ? 2.0 * args.grad_var[first] / count : 0.0) - alpha * over * product / count;
  }
  for (int64_t n = first + threadIdx.x; n < first + samples; n += kThreads) {
    args.norm_gradient[3 * n] = static_cast<float>(alpha);
    args.norm_gradient[3 * n + 1] = static_cast<float>(beta);
    args.norm_gradient[3 * n + 2] = static_cast<float>(gamma);
  }
}

// The gradients of norm_weight, norm_bias, mean and var: one block.
__global__ void __launch_bounds__(kThreads) finish_norm(Backward args) {
  double sums[4] = {};
  for (int64_t n = threadIdx.x; n < args.shape.n; n += kThreads) {
    const float* const moments = moments_of(args, n);
    const double over = 1.0 / sqrt(static_cast<double>(moments[1]) + args.weights.eps);
    const double alpha = *args.weights.norm_weight * over;
    const double flow = args.norm_sums[2 * n], product = args.norm_sums[2 * n + 1];
    sums[0] += product;
    sums[1] += flow;
    sums[2] -= alpha * flow;
    sums[3] -= alpha * over * product / 2.0;
  }
  float* const to[4] = {args.gradients.norm_weight, args.gradients.norm_bias, args.gradients.mean, args.gradients.var};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double sum = add_block(sums[i]);
    if (threadIdx.x == 0 && to[i]) *to[i] = static_cast<float>(sum);
  }
}

__global__ void __launch_bounds__(kThreads) find_d_scores(Backward args, Range range) {
  const CbamShape& s = args.shape;
  const SharedPixel at{s, range, 1};
  if (!at.there) return;
  const float* const by = args.norm_gradient + 3 * at.n;
  const float away = args.saved.scores[at.at] - moments_of(args, at.n)[0];
  args.d_scores[at.at] = fmaf(args.flow[at.at], by[0], fmaf(away, by[2], by[1]));
}

template <int kSize> __global__ void __launch_bounds__(kThreads) convolve_back(Backward args, Range range) {
  const CbamShape& s = args.shape;
  const float* const weights = plane_weights<kSize>(args.weights.spatial_weight);
  const SharedPixel at{s, range, 1};
  if (!at.there) return;
  const float* const d = args.d_scores + at.n * s.h * s.w;
  const float over[2] = {args.ties[at.at], static_cast<float>(s.c)};
  for (int plane = 0; plane < 2; ++plane) {
    const float e = convolve_at<kSize, true>(s, d, weights + plane * s.k * s.k, at.pixel);
    args.d_planes[at.in_plane(plane)] = e / over[plane];
  }
}

constexpr int kTaps = 8;  // of a row of the spatial gate's weights, a block

// The gradient of spatial_weight from a sample: work.spatial [N, 2, k, k]. A block has kTaps of a row of taps.
__global__ void __launch_bounds__(kThreads) correlate_planes(Backward args, Range range) {
  const CbamShape& s = args.shape;
  const int k = static_cast<int>(s.k), h = static_cast<int>(s.h), w = static_cast<int>(s.w), pixels = h * w;
  const unsigned parts = (k + kTaps - 1) / kTaps, rows = 2 * k;
  const int first = static_cast<int>(blockIdx.x % parts) * kTaps, row = static_cast<int>(blockIdx.x / parts % rows);
  const int64_t n = range.first + blockIdx.x / parts / rows;
  const float* const d = args.d_scores + n * pixels;
  const float* const plane = args.saved.planes + (2 * n + row / k) * pixels;
  float sums[kTaps] = {};
  for (int p = threadIdx.x; p < pixels; p += kThreads) {
    const int y = p / w + row % k - k / 2, x = p % w + first - k / 2;
    if (y < 0 || y >= h) continue;
    const float* const from = plane + static_cast<int64_t>(y) * w + x;
    const float by = d[p];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      if (first + i < k && x + i >= 0 && x + i < w) sums[i] = fmaf(by, from[i], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    const double sum = add_block(sums[i]);
    if (threadIdx.x == 0 && first + i < k) {
      args.d_spatial[(n * rows + row) * k + first + i] = static_cast<float>(sum);
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_spatial(Backward args) {
  const CbamShape& s = args.shape;
  const int64_t taps = 2 * s.k * s.k, tap = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tap >= taps) return;
  double sum = 0.0;
  for (int64_t n = 0; n < s.n; ++n) sum += args.d_spatial[n * taps + tap];
  args.gradients.spatial_weight[tap] = static_cast<float>(sum);
}
}}  // namespace raccgan::cuda
