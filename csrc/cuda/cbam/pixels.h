// What the forward and the backward kernels of CBAM share: the gates, and how threads share a pixel.
#pragma once

#include "../common/columns.h"
#include "../passes.h"

namespace raccgan::cuda { namespace {
constexpr int64_t kTilePixels = 256;  // pixels

// Samples first <= n < first + count: what a launch works on.
struct Range {
  int64_t first, count;
};

// run(range) for so many samples at a time that those of `tensors` tensors stay in the second-level cache from one sweep
// to the next: a third of an H100's, not measured on any GPU yet.
template <class Run> void for_groups(const CbamShape& s, int64_t tensors, const Run& run) {
  const int64_t group = most(1, (16 << 20) / (s.c * pixels(s) * size_of(s.dtype) * tensors));
  for (int64_t n = 0; n < s.n; n += group) run(Range{n, least(s.n - n, group)});
}

inline __device__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

inline __device__ float gated(const CbamSpatialGate& gate, float score) {
  return sigmoid(fmaf(score, gate.scale, gate.shift));
}

inline Tiling tiling_of(const CbamShape& s, const Range& range, int V) {
  return {range.count, pixels(s), s.c, kTilePixels, V, range.first};
}

inline int64_t blocks_of_pixels(const CbamShape& s, const Range& range, int group) {
  return ceiling(range.count * pixels(s), kThreads / group);
}

// A thread's pixel of a range of samples, which `group` threads share: `at` in [N, P], of sample n.
struct SharedPixel {
  const CbamShape& s;
  const Range& range;
  int group;
  int member = threadIdx.x % group;
  unsigned i = blockIdx.x * (kThreads / group) + threadIdx.x / group;  // 32 bits hold a range's pixels, see too_large
  bool there = i < range.count * s.h * s.w;  // threads that are not take part in shuffles alone
  int64_t pixel = there ? i % static_cast<unsigned>(s.h * s.w) : 0;
  int64_t n = range.first + (there ? i / static_cast<unsigned>(s.h * s.w) : 0);
  int64_t at = n * s.h * s.w + pixel;

  __device__ int64_t in_plane(int plane) const { return (2 * n + plane) * s.h * s.w + pixel; }
};

inline __device__ float max_over_group(float v, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}

// run(k) with the size of the spatial gate's convolution as a constant where it is the usual one, else with 0: known, a
// pixel takes a fifth of the instructions.
template <class Run> void for_plane_size(int64_t k, const Run& run) {
  k == 7 ? run(Constant<7>{}) : run(Constant<0>{});
}

// The weights of both planes where the block has them at hand. Every thread of the block calls it.
template <int kSize> __device__ const float* plane_weights(const float* weights) {
  if constexpr (kSize == 0) {
    return weights;
  } else {
    __shared__ float shared[2 * kSize * kSize];
    for (int i = threadIdx.x; i < 2 * kSize * kSize; i += kThreads) shared[i] = weights[i];
    __syncthreads();
    return shared;
  }
}

// The sum over i and j of weights[i, j] plane[row + i - k/2, column + j - k/2], or, where `kFlipped`, with the weights
// turned around: the transpose.
template <int kSize, bool kFlipped>
__device__ float convolve_at(const CbamShape& s, const float* plane, const float* weights, int64_t pixel) {
  const int h = static_cast<int>(s.h), w = static_cast<int>(s.w), k = kSize > 0 ? kSize : static_cast<int>(s.k);
  const int row = static_cast<int>(pixel) / w, first = static_cast<int>(pixel) % w - k / 2;
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < k; ++i) {
    const int y = row + i - k / 2;
    if (y < 0 || y >= h) continue;
    const float* const from = plane + static_cast<int64_t>(y) * w + first;
#pragma unroll
    for (int j = 0; j < k; ++j) {
      const int tap = kFlipped ? (k - i) * k - 1 - j : i * k + j;
      if (first + j >= 0 && first + j < w) sum = fmaf(weights[tap], from[j], sum);
    }
  }
  return sum;
}

// A pixel's place in an image is counted in 32 bits.
inline const char* too_large(const CbamShape& s) {
  return pixels(s) <= INT32_MAX ? nullptr : "an image has 2^31 pixels or more";
}
}}  // namespace raccgan::cuda
