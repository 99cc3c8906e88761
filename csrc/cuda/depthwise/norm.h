// The gradient through a depthwise layer's norm, and of its scale and shift, from the sums that convolve.h writes.
#pragma once

#include "images.h"

namespace raccgan::cuda { namespace {
constexpr int kSums = 3;  // of q, q z and q t

// Sums of t and of t z over a block's pixels of a sample: partial [N, blocks, 2, C].
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    sum_tangent(NormedLayer s, const void* x, const void* t, Tiling tiling, float* partial) {
  const Columns<V> at{tiling};
  float mean[V] = {}, root[V] = {}, sums[V] = {}, with_z[V] = {};
  if (at.active) {
    load_floats(s.mean + at.in_row(), mean);
    load_floats(s.var + at.in_row(), root);
  }
  for (int i = 0; i < V; ++i) root[i] = 1.0f / sqrtf(root[i] + s.eps);
  for (int64_t p = at.first, from = at.at(p); p < at.last; p += at.rows, from += at.step) {
    float h[V], v[V];
    load<T, V>(x, from, h);
    load<T, V>(t, from, v);
    for (int i = 0; i < V; ++i) {
      if (s.pre_relu && !(h[i] > 0.0f)) v[i] = 0.0f;
      sums[i] += v[i];
      with_z[i] = fmaf(v[i], ((s.pre_relu ? relu(h[i]) : h[i]) - mean[i]) * root[i], with_z[i]);
    }
  }
  at.write(add_rows(at, sums), add_rows(at, with_z), partial);
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
    finish_affine(NormedLayer s, bool doubly, const float* sums, float* grad_scale, float* grad_shift) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, all = s.n * s.c;
  if (i >= all) return;
  const float q = sums[i], qz = sums[all + i], qt = sums[2 * all + i];
  if (grad_shift) grad_shift[i] = q;
  if (!doubly || !s.mean) {
    grad_scale[i] = doubly ? qt : qz;
  } else {
    grad_scale[i] = (qt - s.t_mean[i] * q - s.tz_mean[i] * qz) / sqrtf(s.var[i] + s.eps);
  }
}

// grad_x = by_q q + by_t t + by_value (h - center) + constant, for the backward or, with t, the double backward.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) finish_norm(NormedLayer s, Tiling tiling, const void* x, const void* t,
                                                        const float* q, const float* sums, void* grad_x) {
  const Columns<V> at{tiling};
  if (!at.active) return;
  const int64_t all = s.n * s.c;
  const float over = 1.0f / static_cast<float>(s.h * s.w);
  float center[V], root[V], slope[V], by_q[V], by_t[V] = {}, by_value[V], constant[V], q_sum[V], qz_sum[V];
  load_floats(s.mean + at.in_row(), center);
  load_floats(s.var + at.in_row(), root);
  if (s.scale) load_floats(s.scale + at.in_row(), slope);
  load_floats(sums + at.in_row(), q_sum);
  load_floats(sums + all + at.in_row(), qz_sum);
  for (int i = 0; i < V; ++i) {
    root[i] = 1.0f / sqrtf(root[i] + s.eps);
    slope[i] = s.scale ? slope[i] * root[i] : root[i];
    by_q[i] = slope[i];
    by_value[i] = -slope[i] * root[i] * qz_sum[i] * over;
    constant[i] = -slope[i] * q_sum[i] * over;
  }
  if (t) {
    float qt_sum[V], t_mean[V], tz_mean[V];
    load_floats(sums + 2 * all + at.in_row(), qt_sum);
    load_floats(s.t_mean + at.in_row(), t_mean);
    load_floats(s.tz_mean + at.in_row(), tz_mean);
    for (int i = 0; i < V; ++i) {
      const float factor = -slope[i] * root[i], q_mean = q_sum[i] * over, qz_mean = qz_sum[i] * over;
      const float curvature = qt_sum[i] * over - t_mean[i] * q_mean - tz_mean[i] * qz_mean;
      by_q[i] = factor * tz_mean[i];
      by_t[i] = factor * qz_mean;
      by_value[i] = factor * root[i] * (curvature - 2.0f * qz_mean * tz_mean[i]);
      constant[i] = -factor * (qz_mean * t_mean[i] + tz_mean[i] * q_mean);
    }
  }
#pragma unroll 1
  for (int64_t p = at.first, i = at.at(p); p < at.last; p += at.rows, i += at.step) {
    float h[V], of_t[V] = {}, of_q[V], v[V];
    load_floats(q + i, of_q);
    load<T, V>(x, i, h);
    if (t) load<T, V>(t, i, of_t);
    for (int j = 0; j < V; ++j) {
      const bool passes = !s.pre_relu || h[j] > 0.0f;
      const float d = (s.pre_relu ? relu(h[j]) : h[j]) - center[j];
      v[j] = fmaf(by_q[j], of_q[j], fmaf(by_value[j], d, constant[j]));
      v[j] = passes ? fmaf(by_t[j], of_t[j], v[j]) : 0.0f;
    }
    store<T, V>(grad_x, i, v);
  }
}
}}  // namespace raccgan::cuda
