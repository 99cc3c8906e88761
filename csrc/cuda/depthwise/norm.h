// The gradient through a depthwise layer's norm, and of its scale and shift, from the sums that convolve.h writes.
#pragma once

#include "images.h"

namespace raccgan::cuda { namespace {
constexpr int kSums = 3;  // of q, q z and q t

// Sums of t and of t z over a block's pixels of a sample: partial [N, blocks, 2, C].
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    sum_tangent(DepthwiseLayer s, Norm norm, const void* x, const void* t, Tiling tiling, float* partial) {
  const Columns<V> at(tiling);
  float mean[V] = {}, root[V] = {}, sums[V] = {}, with_z[V] = {};
  if (at.active) {
    load_floats(norm.mean + at.in_row(tiling), mean);
    load_floats(norm.var + at.in_row(tiling), root);
  }
  for (int i = 0; i < V; ++i) root[i] = 1.0f / sqrtf(root[i] + s.eps);
  for (int64_t p = at.first, from = at.at(tiling, p); p < at.last; p += at.rows, from += at.step) {
    float h[V], v[V];
    load<T, V>(static_cast<const typename T::Stored*>(x) + from, h);
    load<T, V>(static_cast<const typename T::Stored*>(t) + from, v);
    for (int i = 0; i < V; ++i) {
      if (s.pre_relu && !(h[i] > 0.0f)) v[i] = 0.0f;
      sums[i] += v[i];
      with_z[i] = fmaf(v[i], ((s.pre_relu ? relu(h[i]) : h[i]) - mean[i]) * root[i], with_z[i]);
    }
  }
  const float sum = add_rows(at, sums), sum_with_z = add_rows(at, with_z);
  at.write(tiling, sum, sum_with_z, partial);
}

// to[i, n, c] = factor times the sum over the parts of partial [N, parts, values, C], for each of the values. A block
// has a warp of channels of a sample; its warps take the parts in turn.
__global__ void __launch_bounds__(kThreads) add_partial(int64_t samples, int64_t parts, int values, int64_t channels,
                                                        double factor, const float* partial, float* to) {
  __shared__ double shared[kThreads];
  const int64_t chunks = ceiling(channels, kWarp), n = blockIdx.x / chunks;
  const int64_t channel = blockIdx.x % chunks * kWarp + threadIdx.x % kWarp;
  for (int i = 0; i < values; ++i) {
    double sum = 0.0;
    for (int64_t part = threadIdx.x / kWarp; part < parts && channel < channels; part += kWarps) {
      sum += partial[((n * parts + part) * values + i) * channels + channel];
    }
    sum = add_warps(sum, shared, kWarps);
    if (threadIdx.x < kWarp && channel < channels) {
      to[(i * samples + n) * channels + channel] = static_cast<float>(factor * sum);
    }
  }
}

// The gradients of scale and shift from the sums [kSums, N, C]; of scale in the double backward, where t was summed.
__global__ void __launch_bounds__(kThreads)
    finish_affine(DepthwiseLayer s, Norm norm, bool doubly, const float* sums, float* grad_scale, float* grad_shift) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, all = s.n * s.c;
  if (i >= all) return;
  const float q = sums[i], qz = sums[all + i], qt = sums[2 * all + i];
  if (grad_shift) grad_shift[i] = q;
  if (!doubly || !norm.mean) {
    grad_scale[i] = doubly ? qt : qz;
  } else {
    grad_scale[i] = (qt - norm.t_mean[i] * q - norm.tz_mean[i] * qz) / sqrtf(norm.var[i] + s.eps);
  }
}

struct FinishArgs {
  DepthwiseLayer layer;
  Norm norm;
  Tiling tiling;
  const void *x, *t;  // t or null
  const float *q, *sums;
  void* grad_x;
};

// grad_x = by_q q + by_t t + by_value (h - center) + constant, for the backward or, with t, the double backward.
template <int V> struct NormGradient {
  float center[V], by_q[V], by_t[V] = {}, by_value[V], constant[V];

  __device__ NormGradient(const FinishArgs& args, int64_t at) {
    const DepthwiseLayer& s = args.layer;
    const int64_t all = s.n * s.c;
    const float over = 1.0f / static_cast<float>(s.h * s.w);
    float root[V], slope[V], q[V], qz[V];
    load_floats(args.norm.mean + at, center);
    load_floats(args.norm.var + at, root);
    if (s.scale) load_floats(s.scale + at, slope);
    load_floats(args.sums + at, q);
    load_floats(args.sums + all + at, qz);
    for (int i = 0; i < V; ++i) {
      root[i] = 1.0f / sqrtf(root[i] + s.eps);
      slope[i] = s.scale ? slope[i] * root[i] : root[i];
      by_q[i] = slope[i];
      by_value[i] = -slope[i] * root[i] * qz[i] * over;
      constant[i] = -slope[i] * q[i] * over;
    }
    if (!args.t) return;
    float qt[V], t[V], tz[V];
    load_floats(args.sums + 2 * all + at, qt);
    load_floats(args.norm.t_mean + at, t);
    load_floats(args.norm.tz_mean + at, tz);
    for (int i = 0; i < V; ++i) {
      const float factor = -slope[i] * root[i], q_mean = q[i] * over, qz_mean = qz[i] * over;
      const float curvature = qt[i] * over - t[i] * q_mean - tz[i] * qz_mean;
      by_q[i] = factor * tz[i];
      by_t[i] = factor * qz_mean;
      by_value[i] = factor * root[i] * (curvature - 2.0f * qz_mean * tz[i]);
      constant[i] = -factor * (qz_mean * t[i] + tz[i] * q_mean);
    }
  }
};

template <class T, int V> __global__ void __launch_bounds__(kThreads) finish_norm(FinishArgs args) {
  const Columns<V> at(args.tiling);
  if (!at.active) return;
  const NormGradient<V> by(args, at.in_row(args.tiling));
  const bool pre_relu = args.layer.pre_relu;
  for (int64_t p = at.first, i = at.at(args.tiling, p); p < at.last; p += at.rows, i += at.step) {
    float x[V], t[V] = {}, q[V], v[V];
    load_floats(args.q + i, q);
    load<T, V>(static_cast<const typename T::Stored*>(args.x) + i, x);
    if (args.t) load<T, V>(static_cast<const typename T::Stored*>(args.t) + i, t);
    for (int j = 0; j < V; ++j) {
      const bool passes = !pre_relu || x[j] > 0.0f;
      const float d = (pre_relu ? relu(x[j]) : x[j]) - by.center[j];
      v[j] = fmaf(by.by_q[j], q[j], fmaf(by.by_value[j], d, by.constant[j]));
      v[j] = passes ? fmaf(by.by_t[j], t[j], v[j]) : 0.0f;
    }
    store<T, V>(static_cast<typename T::Stored*>(args.grad_x) + i, v);
  }
}
}}  // namespace raccgan::cuda
