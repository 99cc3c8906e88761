// A depthwise convolution, its transpose and its correlation, on tiles in shared memory. Kernel sizes K of 3, 5 and 7;
// p = K / 2; an image is zero outside of itself.
//
//     plain    y[i] = sum over a of w[a] x[i + a - p]
//     down     y[i] = sum over b of v[b] x[2i + b - p]       K + 1 taps: the convolution, then a sum over 2 x 2
//     up       x[m] = sum over i of v[m - 2i + p] y[i]       down transposed: nearest x2, then the convolution
//
// and likewise in the other dimension. Up never multiplies by a zero: each output parity has its own (K + 1) / 2 taps.
//
// A block has 32 channels of a tile of one sample. A warp's lanes are the channels, so neither shared memory nor the
// results of a pixel are ever out of line, and a warp makes a strip of a row of results, in registers.
#pragma once

#include "columns.h"

namespace raccgan {
namespace cuda {
namespace {

enum class Form { kPlain, kDown, kUp };

// Taps of up for outputs of a parity: tap t is v[last_tap - 2t], and meets input j + first_input + t for output 2j.
__host__ __device__ constexpr int last_tap(int k, int parity) { return (parity + k / 2) % 2 == 1 ? k : k - 1; }
__host__ __device__ constexpr int first_input(int k, int parity) {
  return (parity + k / 2 - last_tap(k, parity)) / 2;
}

// ---- the shape of a tile -----------------------------------------------------------------------------------------

// Results: kWarps rows of kStrip. Inputs: kRows x kColumns pixels, from `first` of the results' first row or column.
template <int K, Form kForm>
struct Tile;

template <int K>
struct Tile<K, Form::kPlain> {
  static constexpr int kTaps = K, kWarps = 8, kStrip = 16;
  static constexpr int kRows = kWarps + K - 1, kColumns = kStrip + K - 1;
  static __device__ int64_t first(int64_t out) { return out - K / 2; }
};

template <int K>
struct Tile<K, Form::kDown> {
  static constexpr int kTaps = K + 1, kWarps = 4, kStrip = 8;
  static constexpr int kRows = 2 * (kWarps - 1) + kTaps, kColumns = 2 * (kStrip - 1) + kTaps;
  static __device__ int64_t first(int64_t out) { return 2 * out - K / 2; }
};

template <int K>
struct Tile<K, Form::kUp> {
  static constexpr int kTaps = K + 1, kWarps = 8, kStrip = 16;
  static constexpr int kAround = (K + 1) / 2 - 1 + first_input(K, 1) - first_input(K, 0);
  static constexpr int kRows = kWarps / 2 + kAround, kColumns = kStrip / 2 + kAround;
  static __device__ int64_t first(int64_t out) { return out / 2 + first_input(K, 0); }
};

// ---- the convolution of a tile -----------------------------------------------------------------------------------

// A pixel's channels lie side by side.
template <int kColumns>
__device__ const float* pixel(const float* tile, int row, int column) {
  return tile + (row * kColumns + column) * kWarp + threadIdx.x % kWarp;
}

// sums[s] += sum over t of x[s * kStep + t] weights[t * kEvery]
template <int kTaps, int kStep, int kOutputs, int kEvery>
__device__ void add_row(const float* x, const float* weights, float (&sums)[kOutputs]) {
  float w[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) w[t] = weights[t * kEvery * kWarp];
#pragma unroll
  for (int at = 0; at < (kOutputs - 1) * kStep + kTaps; ++at) {
    const float v = x[at * kWarp];
#pragma unroll
    for (int s = 0; s < kOutputs; ++s) {
      const int t = at - s * kStep;
      if (t >= 0 && t < kTaps) sums[s] = fmaf(v, w[t], sums[s]);
    }
  }
}

// The warp's row of results from `tile` [kRows][kColumns][32] and `weights` [kTaps][kTaps][32].
template <int K, Form kForm>
__device__ void convolve_row(const float* tile, const float* weights, float (&sums)[Tile<K, kForm>::kStrip]) {
  using Shape = Tile<K, kForm>;
  constexpr int kTaps = Shape::kTaps, kColumns = Shape::kColumns;
  const int row = threadIdx.x / kWarp;
  weights += threadIdx.x % kWarp;
  if constexpr (kForm == Form::kUp) {
    constexpr int kHalf = kTaps / 2, kEach = Shape::kStrip / 2;
    float even[kEach] = {}, odd[kEach] = {};
    const int parity = row % 2;
    const int first = row / 2 + (parity == 0 ? 0 : first_input(K, 1) - first_input(K, 0));
    const int last = parity == 0 ? last_tap(K, 0) : last_tap(K, 1);
    constexpr int kOddFirst = first_input(K, 1) - first_input(K, 0);
#pragma unroll 1
    for (int t = 0; t < kHalf; ++t) {
      const float* const v = weights + (last - 2 * t) * kTaps * kWarp;
      // Every other tap, from the last one down.
      add_row<kHalf, 1, kEach, -2>(pixel<kColumns>(tile, first + t, 0), v + last_tap(K, 0) * kWarp, even);
      add_row<kHalf, 1, kEach, -2>(pixel<kColumns>(tile, first + t, kOddFirst), v + last_tap(K, 1) * kWarp, odd);
    }
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
      sums[2 * s] = even[s];
      sums[2 * s + 1] = odd[s];
    }
  } else {
    constexpr int kStep = kForm == Form::kDown ? 2 : 1;
#pragma unroll 1
    for (int t = 0; t < kTaps; ++t) {
      add_row<kTaps, kStep, Shape::kStrip, 1>(pixel<kColumns>(tile, row * kStep + t, 0), weights + t * kTaps * kWarp,
                                              sums);
    }
  }
}

// ---- the correlation of two tiles --------------------------------------------------------------------------------

// totals[a][b] = sum over i of small[i] large[kStep * i + (a, b) - p]: a warp has a row a of taps. `small` is the tile of
// kRows x kStrip pixels that `large` surrounds.
template <int K, int kStep>
struct Pair {
  static constexpr int kTaps = K + kStep - 1, kWarps = kTaps, kStrip = 8, kRows = kStep == 1 ? 8 : 4;
  static constexpr int kLargeRows = kStep * (kRows - 1) + kTaps, kLargeColumns = kStep * (kStrip - 1) + kTaps;
};

template <int K, int kStep>
__device__ void correlate_row(const float* small, const float* large, float (&totals)[Pair<K, kStep>::kTaps]) {
  using Shape = Pair<K, kStep>;
  const int tap = threadIdx.x / kWarp;
#pragma unroll 1
  for (int row = 0; row < Shape::kRows; ++row) {
    const float* const from = pixel<Shape::kLargeColumns>(large, kStep * row + tap, 0);
    const float* const of = pixel<Shape::kStrip>(small, row, 0);
    float v[Shape::kStrip];
#pragma unroll
    for (int s = 0; s < Shape::kStrip; ++s) v[s] = of[s * kWarp];
#pragma unroll
    for (int at = 0; at < Shape::kLargeColumns; ++at) {
      const float x = from[at * kWarp];
#pragma unroll
      for (int s = 0; s < Shape::kStrip; ++s) {
        const int b = at - s * kStep;
        if (b >= 0 && b < Shape::kTaps) totals[b] = fmaf(x, v[s], totals[b]);
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace raccgan
