// CBAM's backward kernels from y to the planes, through the spatial gate and its norm; see backward.cu.
#pragma once

#include "pixels.h"

namespace raccgan::cuda { namespace {
struct Work {
  double* norm_sums;   // [N, 2], over a sample: of what flows to the normalised scores, and of that times them
  float* norm_gradient;  // [N, 3]: alpha, beta, gamma
  float* flow;         // [N, P]
  float* ties;         // [N, P], how many channels reach the pixel's max
  float* d_scores;     // [N, P]
  float* planes;       // [N, 2, P], e_max and e_mean
  float* sums;         // [N, tiles, 2, C]: d gate, and how many pixels reach the channel's max
  float* tied;         // [N, C], the latter over all tiles
  float *average, *maximum;  // [N, C], d average and d max
  float* logits;       // [N, C], to the argument of the channel gate's sigmoid
  float* hidden;       // [N, 2, R], to the arguments of the hidden layers' ReLU
  float* spatial;      // [N, 2, k, k]
  int64_t floats;

  Work(const CbamShape& s, float* memory) {
    Scratch scratch(memory);
    const auto next = [&](int64_t count) { return scratch.take(true, count); };
    const int64_t np = s.n * pixels(s), nc = s.n * s.c;
    norm_sums = reinterpret_cast<double*>(next(4 * s.n));
    norm_gradient = next(3 * s.n);
    flow = next(np);
    ties = next(np);
    d_scores = next(np);
    planes = next(2 * np);
    sums = next(2 * nc * ceiling(pixels(s), kTilePixels));
    tied = next(nc);
    average = next(nc);
    maximum = next(nc);
    logits = next(nc);
    hidden = next(2 * s.n * s.r);
    spatial = next(2 * s.n * s.k * s.k);
    floats = scratch.floats();
  }
};

struct Arguments {
  CbamBackwardArgs pass;
  Work work;
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) find_flow(Arguments args, Range range, int group) {
  const CbamBackwardArgs& pass = args.pass;
  const CbamShape& s = pass.shape;
  const SharedPixel at(s, range, group);
  const auto* const x = static_cast<const typename T::Stored*>(pass.x) + at.at * s.c;
  const auto* const grad_y = static_cast<const typename T::Stored*>(pass.grad_y) + at.at * s.c;
  const float* const gate = pass.saved.gate + at.n * s.c;
  const float largest = pass.saved.planes[at.in_plane(s, 0)];
  float flow = 0.0f, ties = 0.0f;
#pragma unroll 1
  for (int64_t c = at.member * V; c < s.c; c += group * V) {
    float v[V], g[V], channel[V];
    load<T, V>(x + c, v);
    load<T, V>(grad_y + c, g);
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
  const float open = gated(spatial_gate(pass, at.n), pass.saved.scores[at.at]);
  args.work.flow[at.at] = flow * open * (1.0f - open);
  args.work.ties[at.at] = ties;
}

// A block has a sample.
__global__ void __launch_bounds__(kThreads) sum_norm(Arguments args, Range range) {
  __shared__ double shared[kThreads];
  const CbamShape& s = args.pass.shape;
  const int64_t n = range.first + blockIdx.x, pixels = s.h * s.w;
  const float* const moments = moments_of(args.pass, n);
  double flow = 0.0, product = 0.0;
  for (int64_t p = n * pixels + threadIdx.x; p < (n + 1) * pixels; p += kThreads) {
    flow += args.work.flow[p];
    product += static_cast<double>(args.work.flow[p]) * (args.pass.saved.scores[p] - moments[0]);
  }
  flow = add_block(flow, shared);
  product = add_block(product, shared);
  if (threadIdx.x != 0) return;
  args.work.norm_sums[2 * n] = flow;
  args.work.norm_sums[2 * n + 1] = product / sqrt(static_cast<double>(moments[1]) + args.pass.weights.eps);
}

// The gradient of the norm's argument, for the samples of a block that share moments; the formula is that of join_norm
// in cpu/cbam/backward.cpp.
__global__ void __launch_bounds__(kThreads) join_norm(Arguments args, Range range, int64_t samples) {
  __shared__ double shared[kThreads];
  const CbamBackwardArgs& pass = args.pass;
  const int64_t first = range.first + blockIdx.x;
  double flow = 0.0, product = 0.0;
  for (int64_t n = first + threadIdx.x; n < first + samples; n += kThreads) {
    flow += args.work.norm_sums[2 * n];
    product += args.work.norm_sums[2 * n + 1];
  }
  flow = add_block(flow, shared);
  product = add_block(product, shared);
  const float* const moments = moments_of(pass, first);
  const double over = 1.0 / sqrt(static_cast<double>(moments[1]) + pass.weights.eps);
  const double alpha = *pass.weights.norm_weight * over;
  double beta = 0.0, gamma = 0.0;
  if (pass.norm != CbamNorm::kFixed) {
    const double count = static_cast<double>(samples * pass.shape.h * pass.shape.w);
    beta = (pass.grad_mean ? pass.grad_mean[first] / count : 0.0) - alpha * flow / count;
    gamma = (pass.grad_var ? 2.0 * pass.grad_var[first] / count : 0.0) - alpha * over * product / count;
  }
  for (int64_t n = first + threadIdx.x; n < first + samples; n += kThreads) {
    args.work.norm_gradient[3 * n] = static_cast<float>(alpha);
    args.work.norm_gradient[3 * n + 1] = static_cast<float>(beta);
    args.work.norm_gradient[3 * n + 2] = static_cast<float>(gamma);
  }
}

// The gradients of norm_weight, norm_bias, mean and var: one block.
__global__ void __launch_bounds__(kThreads) finish_norm(Arguments args) {
  __shared__ double shared[kThreads];
  const CbamBackwardArgs& pass = args.pass;
  double sums[4] = {};
  for (int64_t n = threadIdx.x; n < pass.shape.n; n += kThreads) {
    const float* const moments = moments_of(pass, n);
    const double over = 1.0 / sqrt(static_cast<double>(moments[1]) + pass.weights.eps);
    const double alpha = *pass.weights.norm_weight * over;
    const double flow = args.work.norm_sums[2 * n], product = args.work.norm_sums[2 * n + 1];
    sums[0] += product;
    sums[1] += flow;
    sums[2] -= alpha * flow;
    sums[3] -= alpha * over * product / 2.0;
  }
  float* const to[4] = {pass.gradients.norm_weight, pass.gradients.norm_bias, pass.gradients.mean, pass.gradients.var};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double sum = add_block(sums[i], shared);
    if (threadIdx.x == 0 && to[i]) *to[i] = static_cast<float>(sum);
  }
}

__global__ void __launch_bounds__(kThreads) find_d_scores(Arguments args, Range range) {
  const CbamShape& s = args.pass.shape;
  const SharedPixel at(s, range, 1);
  if (!at.there) return;
  const float* const by = args.work.norm_gradient + 3 * at.n;
  const float away = args.pass.saved.scores[at.at] - moments_of(args.pass, at.n)[0];
  args.work.d_scores[at.at] = fmaf(args.work.flow[at.at], by[0], fmaf(away, by[2], by[1]));
}

template <int kSize> __global__ void __launch_bounds__(kThreads) convolve_back(Arguments args, Range range) {
  const CbamShape& s = args.pass.shape;
  const float* const weights = plane_weights<kSize>(args.pass.weights.spatial_weight);
  const SharedPixel at(s, range, 1);
  if (!at.there) return;
  const float* const d = args.work.d_scores + at.n * s.h * s.w;
  const float over[2] = {args.work.ties[at.at], static_cast<float>(s.c)};
  for (int plane = 0; plane < 2; ++plane) {
    const float e = convolve_at<kSize, true>(s, d, weights + plane * s.k * s.k, at.pixel);
    args.work.planes[at.in_plane(s, plane)] = e / over[plane];
  }
}

constexpr int kTaps = 8;  // of a row of the spatial gate's weights, a block

// The gradient of spatial_weight from a sample: work.spatial [N, 2, k, k]. A block has kTaps of a row of taps.
__global__ void __launch_bounds__(kThreads) correlate_planes(Arguments args, Range range) {
  __shared__ double shared[kThreads];
  const CbamShape& s = args.pass.shape;
  const int k = static_cast<int>(s.k), h = static_cast<int>(s.h), w = static_cast<int>(s.w), pixels = h * w;
  const unsigned parts = (k + kTaps - 1) / kTaps, rows = 2 * k;
  const int first = static_cast<int>(blockIdx.x % parts) * kTaps, row = static_cast<int>(blockIdx.x / parts % rows);
  const int64_t n = range.first + blockIdx.x / parts / rows;
  const float* const d = args.work.d_scores + n * pixels;
  const float* const plane = args.pass.saved.planes + (2 * n + row / k) * pixels;
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
    const double sum = add_block(sums[i], shared);
    if (threadIdx.x == 0 && first + i < k) {
      args.work.spatial[(n * rows + row) * k + first + i] = static_cast<float>(sum);
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_spatial(Arguments args) {
  const CbamShape& s = args.pass.shape;
  const int64_t taps = 2 * s.k * s.k, tap = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tap >= taps) return;
  double sum = 0.0;
  for (int64_t n = 0; n < s.n; ++n) sum += args.work.spatial[n * taps + tap];
  args.pass.gradients.spatial_weight[tap] = static_cast<float>(sum);
}
}}  // namespace raccgan::cuda
