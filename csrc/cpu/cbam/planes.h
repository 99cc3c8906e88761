// Convolution of planes: a tile of rows in scratch memory, with zeros around the image, a vector of columns at a time.
//
// Included by the per-target sources only. Everything here is in an anonymous namespace, for the reason in targets.h.
#pragma once

#include "lanes.h"

namespace raccgan {
namespace {

constexpr int kRows = 4;  // of output at a time

// A tile of a plane's rows, and where the rows around it lie in scratch memory.
struct Tile {
  int64_t sample, first, last;  // rows
  int64_t stride;               // of a row in scratch memory
  int64_t size;                 // of a plane there

  Tile(const CbamShape& s, int64_t task)
      : sample(task / tiles(s)),
        first(task % tiles(s) * rows_per_tile(s)),
        last(least(s.h, first + rows_per_tile(s))),
        stride(rounded_up(s.w, (s.w > kWidth ? 2 : 1) * kWidth) + s.k - 1),
        size((rounded_up(last - first, kRows) + s.k - 1) * stride) {}

  int64_t in_plane(const CbamShape& s) const { return (sample * s.h + first) * s.w; }
};

// Fills the scratch memory with the tile and k / 2 rows and columns around it: zeros outside of the image, and inside
// write(row, to) writes a row.
template <class Write>
void fill(const CbamShape& s, const Tile& tile, float* scratch, const Write& write) {
  const int64_t reach = s.k / 2;
  for (float* to = scratch; to < scratch + tile.size; ++to) *to = 0;
  for (int64_t row = most(0, tile.first - reach); row < least(s.h, tile.last + reach); ++row) {
    write(row, scratch + (row - tile.first + reach) * tile.stride + reach);
  }
}

void copy_plane(const CbamShape& s, const Tile& tile, const float* plane, float* scratch) {
  fill(s, tile, scratch, [&](int64_t row, float* to) { memcpy(to, plane + row * s.w, s.w * sizeof *to); });
}

// kRows rows of kVectors vectors, from `in`, planes of the tile in scratch memory.
template <int kVectors>
inline RACCGAN_INLINE void convolve_tile(const Tile& tile, int64_t k, int64_t in_planes, const float* in,
                                         const float* weights, Floats (&sums)[kRows][kVectors]) {
  for (int64_t plane = 0; plane < in_planes; ++plane, in += tile.size) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const Floats weight = all(*weights++);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            sums[row][v] = multiply_add(weight, load(in + (row + i) * tile.stride + j + v * kWidth), sums[row][v]);
          }
        }
      }
    }
  }
}

template <int kVectors>
void convolve_as(const CbamShape& s, const Tile& tile, int64_t in_planes, const float* in, const float* weights,
                 float* out) {
  for (int64_t row = 0; row < tile.last - tile.first; row += kRows) {
    for (int64_t column = 0; column < s.w; column += kVectors * kWidth) {
      Floats sums[kRows][kVectors] = {};
      convolve_tile(tile, s.k, in_planes, in + row * tile.stride + column, weights, sums);
      for (int64_t i = 0; i < kRows && row + i < tile.last - tile.first; ++i) {
        for (int64_t v = 0; v < kVectors && column + v * kWidth < s.w; ++v) {
          const int64_t at = column + v * kWidth;
          float* const to = out + (row + i) * s.w + at;
          if (at + kWidth <= s.w) {
            store(to, sums[i][v]);
          } else {
            Rest{s.w - at}.store<Float32>(to, sums[i][v]);
          }
        }
      }
    }
  }
}

// out[row, column] = the sum over the planes, i and j of
// weights[plane, i, j] in[plane, row + i - k/2, column + j - k/2]
void convolve(const CbamShape& s, const Tile& tile, int64_t in_planes, const float* in, const float* weights,
              float* out) {
  const auto run = s.w > kWidth ? convolve_as<2> : convolve_as<1>;
  run(s, tile, in_planes, in, weights, out);
}

}  // namespace
}  // namespace raccgan
