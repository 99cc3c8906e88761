// Convolution of planes and the way back: a tile of rows in scratch memory, with zeros around the image, a vector of
// columns at a time.
#pragma once

#include "tasks.h"

namespace raccgan { namespace {
// Fills the scratch memory with the tile and k / 2 rows and columns around it: zeros outside of the image, and inside
// write(row, to) writes a row.
template <class Write> void fill(const CbamShape& s, const Tile& tile, float* scratch, const Write& write) {
  const int64_t reach = s.k / 2;
  for (float* to = scratch; to < scratch + tile.size; ++to) *to = 0;
  for (int64_t row = most(0, tile.first - reach); row < least(s.h, tile.last + reach); ++row) {
    write(row, scratch + (row - tile.first + reach) * tile.stride + reach);
  }
}

inline void copy_plane(const CbamShape& s, const Tile& tile, const float* plane, float* scratch) {
  fill(s, tile, scratch, [&](int64_t row, float* to) { memcpy(to, plane + row * s.w, s.w * sizeof *to); });
}

// Both planes [2, P].
inline void copy_planes(const CbamShape& s, const Tile& tile, const float* planes, float* scratch) {
  for (int i = 0; i < 2; ++i) copy_plane(s, tile, planes + i * pixels(s), scratch + i * tile.size);
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
        float* const to = out + (row + i) * s.w + column;
        for_vectors<kVectors>(s.w - column,
                              [&](auto lanes, int v) RACCGAN_INLINE { lanes.store(to + v * kWidth, sums[i][v]); });
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

// sums[j] = the sum over the tile of d[row, column] in[row + i - k/2, column + j - k/2] for kTaps columns j.
template <int kTaps> void correlate(const CbamShape& s, const Tile& tile, const float* d, const float* in, float* to) {
  Floats sums[kTaps] = {};
  for (int64_t row = 0; row < tile.last - tile.first; ++row) {
    for_lanes(s.w, [&](auto lanes, int64_t column) RACCGAN_INLINE {
      const Floats v = lanes.load(d + row * tile.stride + column);
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) {
        sums[j] = multiply_add(v, load(in + row * tile.stride + column + j), sums[j]);
      }
    });
  }
  for (int j = 0; j < kTaps; ++j) to[j] = static_cast<float>(sum_of_lanes(sums[j]));
}

// to[plane, i, j] over one tile: of both planes [2, P], and of d in scratch memory with zeros around it. scratch: two
// planes of the tile.
inline void correlate_planes(const CbamShape& s, const Tile& tile, const float* d, const float* planes, float* scratch,
                             float* to) {
  copy_planes(s, tile, planes, scratch);
  d += s.k / 2 * (tile.stride + 1);
  for (int plane = 0; plane < 2; ++plane) {
    for (int64_t i = 0; i < s.k; ++i, to += s.k) {
      const float* const in = scratch + plane * tile.size + i * tile.stride;
      if (s.k == 7) {
        correlate<7>(s, tile, d, in, to);
      } else if (s.k == 3) {
        correlate<3>(s, tile, d, in, to);
      } else {
        for (int64_t j = 0; j < s.k; ++j) correlate<1>(s, tile, d, in + j, to + j);
      }
    }
  }
}

// Both planes' weights turned by half a circle: to correlate with the one is to convolve with the other.
inline void flip(const float* weights, int64_t k, float* to) {
  const int64_t taps = k * k;
  for (int64_t i = 0; i < 2 * taps; ++i) to[i] = weights[i / taps * taps + (taps - 1 - i % taps)];
}

// From d, what flows to a tile of scores, in scratch memory with zeros around it, to e [2, P]: what flows to each channel
// that reaches a pixel's max, one of ties [P], and to each channel through the mean. flipped: the weights by `flip`.
inline void convolve_back(const CbamShape& s, const Tile& tile, const float* d, const float* flipped, const float* ties,
                          float* e) {
  const int64_t from = tile.first * s.w, size = pixels(s);
  for (int plane = 0; plane < 2; ++plane) convolve(s, tile, 1, d, flipped + plane * s.k * s.k, e + plane * size + from);
  for (int64_t i = from; i < from + tile.count(s); ++i) {
    e[i] /= ties[i], e[size + i] /= static_cast<float>(s.c);
  }
}
}}  // namespace raccgan
