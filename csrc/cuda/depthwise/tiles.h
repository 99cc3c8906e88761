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
// results of a pixel are ever out of line. A thread makes strips of a few rows of results in registers: a number that
// it reads from the tile meets the taps of all of them. A multiprocessor multiplies and adds four numbers in the time
// of one read from shared memory, and 7 x 7 taps on 2 rows of 16 results read one for 5.7.
#pragma once

#include "../common/columns.h"

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

constexpr int kDeep = 2;  // rows of results a thread

// Results: kHigh rows, kDeep a warp, of kStrip. Inputs: kRows x kColumns pixels, from `first` of the results' first row
// or column.
template <int K, Form kForm, int kWarpCount>
struct Tile;

template <int K, int kWarpCount>
struct Tile<K, Form::kPlain, kWarpCount> {
  static constexpr int kTaps = K, kWarps = kWarpCount, kHigh = kWarps * kDeep, kStrip = 16;
  static constexpr int kRows = kHigh + K - 1, kColumns = kStrip + K - 1;
  static __device__ int first(int out) { return out - K / 2; }
};

template <int K, int kWarpCount>
struct Tile<K, Form::kDown, kWarpCount> {
  static constexpr int kTaps = K + 1, kWarps = kWarpCount, kHigh = kWarps * kDeep, kStrip = 8;
  static constexpr int kRows = 2 * (kHigh - 1) + kTaps, kColumns = 2 * (kStrip - 1) + kTaps;
  static __device__ int first(int out) { return 2 * out - K / 2; }
};

template <int K, int kWarpCount>
struct Tile<K, Form::kUp, kWarpCount> {
  static constexpr int kTaps = K + 1, kWarps = kWarpCount, kHigh = kWarps * kDeep, kStrip = 16;
  static constexpr int kAround = kTaps / 2 - 1 + first_input(K, 1) - first_input(K, 0);
  static constexpr int kRows = kHigh / 2 + kAround, kColumns = kStrip / 2 + kAround;
  static __device__ int first(int out) { return out / 2 + first_input(K, 0); }
};

// ---- the convolution of a tile -----------------------------------------------------------------------------------

// A pixel's channels lie side by side.
template <int kColumns>
__device__ const float* pixel(const float* tile, int row, int column) {
  return tile + (row * kColumns + column) * kWarp + threadIdx.x % kWarp;
}

// sums[o][i] += sum over t of x[i * kStep + t] weights[t] for the rows kFirst to kLast of results. `weights` are the
// row of taps that the first row of results meets x with; the next one is kStep rows of taps behind.
template <int kTaps, int kStep, int kFirst, int kLast, int kStrip>
__device__ void add_row(const float* x, const float* weights, float (&sums)[kDeep][kStrip]) {
  float w[kDeep][kTaps];
#pragma unroll
  for (int o = kFirst; o <= kLast; ++o) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) w[o][t] = weights[(t - o * kStep * kTaps) * kWarp];
  }
#pragma unroll
  for (int at = 0; at < (kStrip - 1) * kStep + kTaps; ++at) {
    const float v = x[at * kWarp];
#pragma unroll
    for (int o = kFirst; o <= kLast; ++o) {
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        const int t = at - i * kStep;
        if (t >= 0 && t < kTaps) sums[o][i] = fmaf(v, w[o][t], sums[o][i]);
      }
    }
  }
}

// The thread's results from `tile` [kRows][kColumns][32] and `weights` [kTaps][kTaps][32].
template <int K, Form kForm, class Shape>
__device__ void convolve_rows(const float* tile, const float* weights, float (&sums)[kDeep][Shape::kStrip]) {
  constexpr int kTaps = Shape::kTaps, kColumns = Shape::kColumns, kStrip = Shape::kStrip;
  static_assert(kDeep == 2);
  const int warp = threadIdx.x / kWarp;
  weights += threadIdx.x % kWarp;
  if constexpr (kForm == Form::kUp) {
    // The two rows have both parities, and so have neighbours in a row: all meet the same inputs, some one later.
    constexpr int kHalf = kTaps / 2, kLater = first_input(K, 1) - first_input(K, 0);
#pragma unroll
    for (int r = 0; r < kHalf + kLater; ++r) {
      float w[2][2][kHalf];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int t = r - row * kLater;
        if (t < 0 || t >= kHalf) continue;
#pragma unroll
        for (int i = 0; i < 2 * kHalf; ++i) {
          const int tap = (last_tap(K, row) - 2 * t) * kTaps + last_tap(K, i / kHalf) - 2 * (i % kHalf);
          w[row][i / kHalf][i % kHalf] = weights[tap * kWarp];
        }
      }
#pragma unroll
      for (int at = 0; at < kColumns; ++at) {
        const float v = pixel<kColumns>(tile, warp + r, at)[0];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int t = r - row * kLater;
          if (t < 0 || t >= kHalf) continue;
#pragma unroll
          for (int i = 0; i < kStrip; ++i) {
            const int column = at - i / 2 - i % 2 * kLater;
            if (column >= 0 && column < kHalf) sums[row][i] = fmaf(v, w[row][i % 2][column], sums[row][i]);
          }
        }
      }
    }
  } else {
    constexpr int kStep = kForm == Form::kDown ? 2 : 1;
    const float* x = pixel<kColumns>(tile, warp * kDeep * kStep, 0);
#pragma unroll
    for (int r = 0; r < kStep; ++r, x += kColumns * kWarp) {
      add_row<kTaps, kStep, 0, 0>(x, weights + r * kTaps * kWarp, sums);
    }
#pragma unroll(kTaps <= 4 ? kTaps : 1)
    for (int r = kStep; r < kTaps; ++r, x += kColumns * kWarp) {
      add_row<kTaps, kStep, 0, 1>(x, weights + r * kTaps * kWarp, sums);
    }
#pragma unroll
    for (int r = kTaps; r < kTaps + kStep; ++r, x += kColumns * kWarp) {
      add_row<kTaps, kStep, 1, 1>(x, weights + r * kTaps * kWarp, sums);
    }
  }
}

// ---- the correlation of two tiles --------------------------------------------------------------------------------

// totals[a][b] = sum over i of small[i] large[kStep * i + (a, b) - p]: a thread has all taps of kDeep rows of `small`,
// the tile of kRows x kStrip pixels that `large` surrounds.
template <int K, int kStep>
struct Pair {
  static constexpr int kTaps = K + kStep - 1, kWarps = kStep == 1 ? 8 : 4, kRows = kWarps * kDeep, kStrip = 8;
  static constexpr int kLargeRows = kStep * (kRows - 1) + kTaps, kLargeColumns = kStep * (kStrip - 1) + kTaps;
};

template <int K, int kStep>
__device__ void correlate_rows(const float* small, const float* large,
                               float (&totals)[Pair<K, kStep>::kTaps][Pair<K, kStep>::kTaps]) {
  using Shape = Pair<K, kStep>;
  const int first = threadIdx.x / kWarp * kDeep;
  float ours[kDeep][Shape::kStrip];
#pragma unroll
  for (int o = 0; o < kDeep; ++o) {
#pragma unroll
    for (int i = 0; i < Shape::kStrip; ++i) ours[o][i] = pixel<Shape::kStrip>(small, first + o, i)[0];
  }
#pragma unroll
  for (int r = 0; r < (kDeep - 1) * kStep + Shape::kTaps; ++r) {
#pragma unroll
    for (int at = 0; at < Shape::kLargeColumns; ++at) {
      const float v = pixel<Shape::kLargeColumns>(large, first * kStep + r, at)[0];
#pragma unroll
      for (int o = 0; o < kDeep; ++o) {
        const int a = r - o * kStep;
        if (a < 0 || a >= Shape::kTaps) continue;
#pragma unroll
        for (int i = 0; i < Shape::kStrip; ++i) {
          const int b = at - i * kStep;
          if (b >= 0 && b < Shape::kTaps) totals[a][b] = fmaf(v, ours[o][i], totals[a][b]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace raccgan
