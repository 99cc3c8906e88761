// A depthwise convolution, its transpose and its correlation, on tiles in shared memory, as defined in
// cpu/depthwise/convolution.cpp. Kernel sizes K of 3, 5 and 7; p = K / 2.
//
// A block has 32 channels of a tile of one sample. Lanes map to channels: shared memory has no bank conflicts, and
// global accesses coalesce. A thread keeps a few rows of results in registers, so that one number of the tile meets the
// taps of all of them. A multiprocessor does four multiply-adds in the time of one read from shared memory; 7 x 7 taps
// on 2 rows of 16 results do 5.7 a read.
#pragma once

#include "../../ops/depthwise.h"
#include "../common/columns.h"

namespace raccgan::cuda { namespace {
constexpr int kThreadRows = 2;  // rows of results a thread

// Columns of a tile of results.
RACCGAN_HOST_DEVICE constexpr int width_of(Resize resize) { return resize == Resize::kDown ? 8 : 16; }

// Tiles of a sample's results.
inline int64_t tiles(Resize resize, int warps, int64_t rows, int64_t columns) {
  return ceiling(rows, warps * kThreadRows) * ceiling(columns, width_of(resize));
}

// Results: kHigh x kWide pixels, kThreadRows rows a warp. Inputs: kRows x kColumns pixels, from `first` of the results'
// first row or column.
template <int K, Resize kResize, int kWarpCount> struct Tile {
  static constexpr bool kUp = kResize == Resize::kUp;
  static constexpr int kTaps = kResize == Resize::kNone ? K : K + 1, kStep = kResize == Resize::kDown ? 2 : 1;
  static constexpr int kWarps = kWarpCount, kHigh = kWarps * kThreadRows, kWide = width_of(kResize);
  static constexpr int kAround = kTaps / 2 - 1 + first_input(K, 1) - first_input(K, 0);
  static constexpr int kRows = kUp ? kHigh / 2 + kAround : kStep * (kHigh - 1) + kTaps;
  static constexpr int kColumns = kUp ? kWide / 2 + kAround : kStep * (kWide - 1) + kTaps;
  static __device__ int first(int out) { return kUp ? out / 2 + first_input(K, 0) : kStep * out - K / 2; }
};

// A block's tile of results, in a launch of `parts` parts a tile, tiles a sample and samples. A division of 64 bits is
// some hundred instructions; a grid's sizes have 32.
template <class Shape> struct Position {
  int64_t rows, columns;
  unsigned parts, across = static_cast<unsigned>(ceiling(columns, Shape::kWide));
  unsigned tiles = static_cast<unsigned>(ceiling(rows, Shape::kHigh)) * across;
  unsigned part = blockIdx.x % parts, tile = blockIdx.x / parts % tiles;
  int64_t n = blockIdx.x / parts / tiles;
  int row = static_cast<int>(tile / across) * Shape::kHigh, column = static_cast<int>(tile % across) * Shape::kWide;
};

// A pixel's channels lie side by side.
template <int kColumns> __device__ const float* pixel(const float* tile, int row, int column) {
  return tile + (row * kColumns + column) * kWarp + threadIdx.x % kWarp;
}

// sums[o][i] += sum over t of x[i * kStep + t] weights[t] for the rows kFirst to kLast of results. `weights` is the row
// of taps of the first row of results at x; that of the next row lies kStep rows of taps before.
template <int kTaps, int kStep, int kFirst, int kLast, int kWide>
__device__ void add_row(const float* x, const float* weights, float (&sums)[kThreadRows][kWide]) {
  float w[kThreadRows][kTaps];
#pragma unroll
  for (int o = kFirst; o <= kLast; ++o) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) w[o][t] = weights[(t - o * kStep * kTaps) * kWarp];
  }
#pragma unroll
  for (int at = 0; at < (kWide - 1) * kStep + kTaps; ++at) {
    const float v = x[at * kWarp];
#pragma unroll
    for (int o = kFirst; o <= kLast; ++o) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const int t = at - i * kStep;
        if (t >= 0 && t < kTaps) sums[o][i] = fmaf(v, w[o][t], sums[o][i]);
      }
    }
  }
}

// The thread's results from `tile` [kRows][kColumns][32] and `weights` [kTaps][kTaps][32].
template <int K, Resize kResize, class Shape>
__device__ void convolve_rows(const float* tile, const float* weights, float (&sums)[kThreadRows][Shape::kWide]) {
  constexpr int kTaps = Shape::kTaps, kColumns = Shape::kColumns, kWide = Shape::kWide;
  static_assert(kThreadRows == 2);
  const int warp = threadIdx.x / kWarp;
  weights += threadIdx.x % kWarp;
  if constexpr (kResize == Resize::kUp) {
    // The two rows have both parities, and so have neighbours in a row: all use the same inputs, some one input later.
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
          for (int i = 0; i < kWide; ++i) {
            const int column = at - i / 2 - i % 2 * kLater;
            if (column >= 0 && column < kHalf) sums[row][i] = fmaf(v, w[row][i % 2][column], sums[row][i]);
          }
        }
      }
    }
  } else {
    constexpr int kStep = Shape::kStep;
    const float* x = pixel<kColumns>(tile, warp * kThreadRows * kStep, 0);
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

// totals[a][b] = sum over i of small[i] large[kStep * i + (a, b) - p]: a thread has all taps for kThreadRows rows of
// `small`, a tile of kRows x kWide pixels that `large` surrounds.
template <int K, int kStep> struct CorrelationTile {
  static constexpr int kTaps = K + kStep - 1, kWarps = kStep == 1 ? 8 : 4, kRows = kWarps * kThreadRows, kWide = 8;
  static constexpr int kLargeRows = kStep * (kRows - 1) + kTaps, kLargeColumns = kStep * (kWide - 1) + kTaps;
};

template <int K, int kStep>
__device__ void correlate_rows(const float* small, const float* large,
                               float (&totals)[CorrelationTile<K, kStep>::kTaps][CorrelationTile<K, kStep>::kTaps]) {
  using Shape = CorrelationTile<K, kStep>;
  const int first = threadIdx.x / kWarp * kThreadRows;
  float ours[kThreadRows][Shape::kWide];
#pragma unroll
  for (int o = 0; o < kThreadRows; ++o) {
#pragma unroll
    for (int i = 0; i < Shape::kWide; ++i) ours[o][i] = pixel<Shape::kWide>(small, first + o, i)[0];
  }
#pragma unroll
  for (int r = 0; r < (kThreadRows - 1) * kStep + Shape::kTaps; ++r) {
#pragma unroll
    for (int at = 0; at < Shape::kLargeColumns; ++at) {
      const float v = pixel<Shape::kLargeColumns>(large, first * kStep + r, at)[0];
#pragma unroll
      for (int o = 0; o < kThreadRows; ++o) {
        const int a = r - o * kStep;
        if (a < 0 || a >= Shape::kTaps) continue;
#pragma unroll
        for (int i = 0; i < Shape::kWide; ++i) {
          const int b = at - i * kStep;
          if (b >= 0 && b < Shape::kTaps) totals[a][b] = fmaf(v, ours[o][i], totals[a][b]);
        }
      }
    }
  }
}
}}  // namespace raccgan::cuda
