// What the kernels of CBAM's first and second gradients share.
//
// Included by the per-target sources only. Everything here is in an anonymous namespace, for the reason in targets.h.
#pragma once

#include "lanes.h"
#include "planes.h"

namespace raccgan {
namespace {

// 1 where u is the max.
inline Floats reaches(Floats u, Floats max) { return select((Words)(u == max), all(1.0f), Floats{}); }

// sums[c] += v, or = v at the first pixel.
template <class L>
inline RACCGAN_INLINE void add_to(const L& lanes, float* sums, int64_t p, Floats v) {
  lanes.template store<Float32>(sums, p == 0 ? v : v + lanes.template load<Float32>(sums));
}

// sums[j] = the sum over the tile of d[row, column] in[row + i - k/2, column + j - k/2] for kTaps columns j.
template <int kTaps>
void correlate(const CbamShape& s, const Tile& tile, const float* d, const float* in, float* to) {
  Floats sums[kTaps] = {};
  for (int64_t row = 0; row < tile.last - tile.first; ++row) {
    for_lanes(s.w, [&](auto lanes, int64_t column) RACCGAN_INLINE {
      const Floats v = lanes.template load<Float32>(d + row * tile.stride + column);
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) {
        sums[j] = multiply_add(v, load(in + row * tile.stride + column + j), sums[j]);
      }
    });
  }
  for (int j = 0; j < kTaps; ++j) to[j] = static_cast<float>(sum_of_lanes(sums[j]));
}

// to[plane, i, j] over one tile, from the tile in scratch memory: of both planes, and of d with zeros around it.
inline void correlate_planes(const CbamShape& s, const Tile& tile, const float* d, const float* planes, float* to) {
  d += s.k / 2 * (tile.stride + 1);
  for (int plane = 0; plane < 2; ++plane) {
    for (int64_t i = 0; i < s.k; ++i, to += s.k) {
      const float* const in = planes + plane * tile.size + i * tile.stride;
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

// to[j] = the sum over i of matrix[i, j] vector[i].
inline void transposed_product(const float* matrix, const float* vector, int64_t rows, int64_t columns, float* to) {
  for_lanes(columns, [&](auto lanes, int64_t j) RACCGAN_INLINE {
    Floats sum{};
    for (int64_t i = 0; i < rows; ++i) {
      sum = multiply_add(lanes.template load<Float32>(matrix + i * columns + j), all(vector[i]), sum);
    }
    lanes.template store<Float32>(to + j, sum);
  });
}

// to[j] = the sum over n of a[n] b[n, j], rows of a and b `a_stride` and `b_stride` apart.
inline void outer_sum(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, int64_t columns,
                      bool add, float* to) {
  for_lanes(columns, [&](auto lanes, int64_t j) RACCGAN_INLINE {
    Floats sum = add ? lanes.template load<Float32>(to + j) : Floats{};
    for (int64_t i = 0; i < n; ++i) {
      sum = multiply_add(all(a[i * a_stride]), lanes.template load<Float32>(b + i * b_stride + j), sum);
    }
    lanes.template store<Float32>(to + j, sum);
  });
}

inline float strided_sum(const float* v, int64_t stride, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += v[i * stride];
  return static_cast<float>(sum);
}

}  // namespace
}  // namespace raccgan
