// What the forward and the backward kernels of CBAM share: the gates, and how threads share a pixel.
#pragma once

#include "cbam.h"
#include "columns.h"

namespace raccgan {
namespace cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;

// Samples first <= n < first + count: what a launch works on.
struct Range {
  int64_t first, count;
};

// Samples at a time, so that those of `tensors` tensors stay in the second-level cache from one sweep to the next. Not
// measured on any GPU yet: a third of an H100's cache. In emulation little, so that small shapes have several groups.
inline int64_t samples_a_group(const CbamShape& s, int64_t tensors) {
#ifdef RACCGAN_EMULATION
  constexpr int64_t kBytes = 1 << 12;
#else
  constexpr int64_t kBytes = 16 << 20;
#endif
  const int64_t bytes = s.c * s.pixels() * size_of(s.dtype) * tensors;
  return bytes < kBytes ? kBytes / bytes : 1;
}

// run(range) for all samples, group by group.
template <class Run>
void for_groups(const CbamShape& s, int64_t tensors, const Run& run) {
  const int64_t group = samples_a_group(s, tensors);
  for (int64_t n = 0; n < s.n; n += group) run(Range{n, s.n - n < group ? s.n - n : group});
}

inline __device__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// How a sample's scores become its spatial gate.
struct SpatialGate {
  float scale, shift;

  __device__ SpatialGate(const CbamWeights& weights, const float* moments)
      : scale(*weights.norm_weight / sqrtf(moments[1] + weights.eps)),
        shift(*weights.norm_bias - moments[0] * scale) {}

  __device__ float operator()(float score) const { return sigmoid(fmaf(score, scale, shift)); }
};

inline __device__ const float* moments_of(const CbamSaved& saved, bool shared, int64_t n) {
  return saved.moments + (shared ? 0 : 2 * n);
}

// ---- a pixel's channels ------------------------------------------------------------------------------------------

// `group` neighbouring threads, a power of two up to a warp, share a pixel: about four loads each.
inline int threads_a_pixel(int64_t channels, int V) {
  int group = 1;
  while (group < kWarp && group * 4 < channels / V) group *= 2;
  return group;
}

inline int64_t blocks_of_pixels(const CbamShape& s, const Range& range, int group) {
  return ceiling(range.count * s.pixels(), kThreads / group);
}

// A thread's pixel of a range of samples: `at` in [N, P], of sample n.
struct SharedPixel {
  int64_t n, pixel, at;
  int member;
  bool there;  // threads that are not take part in shuffles alone

  __device__ SharedPixel(const CbamShape& s, const Range& range, int group) : member(threadIdx.x % group) {
    const int64_t pixels = s.h * s.w;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / group) + threadIdx.x / group;
    there = i < range.count * pixels;
    at = range.first * pixels + (there ? i : 0);
    n = at / pixels;
    pixel = at % pixels;
  }

  __device__ int64_t in_plane(const CbamShape& s, int plane) const { return (2 * n + plane) * s.h * s.w + pixel; }
};

inline __device__ float sum_over_group(float v, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

inline __device__ float max_over_group(float v, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}

// ---- planes ------------------------------------------------------------------------------------------------------

// The sum over i and j of weights[i, j] plane[row + i - k/2, column + j - k/2], or, where `flipped`, with the weights
// turned around: the transpose.
inline __device__ float convolve_at(const float* plane, const float* weights, int64_t h, int64_t w, int k, bool flipped,
                             int64_t row, int64_t column) {
  float sum = 0.0f;
  for (int i = 0; i < k; ++i) {
    const int64_t y = row + i - k / 2;
    if (y < 0 || y >= h) continue;
    for (int j = 0; j < k; ++j) {
      const int64_t x = column + j - k / 2;
      const int tap = i * k + j;
      if (x >= 0 && x < w) sum = fmaf(weights[flipped ? k * k - 1 - tap : tap], plane[y * w + x], sum);
    }
  }
  return sum;
}

}  // namespace
}  // namespace cuda
}  // namespace raccgan
