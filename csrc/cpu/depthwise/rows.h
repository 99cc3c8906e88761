// The arithmetic of a depthwise convolution on planes in scratch memory (lanes.h): rows of it, of its transpose, and
// its correlation. Kernel sizes k of 3, 5 and 7; p = k / 2; a plane is zero outside of itself.
//
//     plain    y[i] = sum over a of w[a] x[i + a - p]
//     down     y[i] = sum over b of v[b] x[2i + b - p]       k + 1 taps: the convolution, then a sum over 2 x 2
//     up       x[m] = sum over i of v[m - 2i + p] y[i]       down transposed: nearest x2, then the convolution
//
// and likewise in the other dimension. Up never multiplies by a zero: each output parity has its own (k + 1) / 2 taps.
#pragma once

#include "../simd/lanes.h"

namespace raccgan {
namespace {

constexpr int kWideTile = kManyRegisters ? 8 : 4;

// sums[t] += sum over j of weights[j] x[t * kStep + j].
template <int kTaps, int kStep, int kOutputs>
inline __attribute__((always_inline)) void add_row(const float* x, const float* weights, Floats (&sums)[kOutputs]) {
#pragma GCC unroll 24
  for (int at = 0; at < (kOutputs - 1) * kStep + kTaps; ++at) {
    const Floats column = load(x + at * kWidth);
#pragma GCC unroll 8
    for (int j = at % kStep; j < kTaps; j += kStep) {
      const int t = (at - j) / kStep;
      if (at >= j && t < kOutputs) sums[t] = multiply_add(column, load(weights + j * kWidth), sums[t]);
    }
  }
}

// The rows of a plane that meet the taps of one output row: tap `tap` meets row `row`, and so on for `count` of them.
struct Met {
  int64_t row, tap, count;
};

inline Met met(int64_t first, int64_t taps, int64_t rows) {
  const int64_t from = most(0, first);
  return {from, from - first, least(rows, first + taps) - from};
}

// kOutputs numbers of a row, each kStepOut columns after the one before it.
template <int kTaps, int kStep, int kStepOut, int kOutputs>
inline __attribute__((always_inline)) void row_tile(const Plane& x, const Met& met, int64_t column,
                                                    const float* weights, float* row) {
  Floats sums[kOutputs];
#pragma GCC unroll 8
  for (int t = 0; t < kOutputs; ++t) sums[t] = Floats{};
  const float* from = x.at(met.row, column);
  weights += met.tap * kTaps * kWidth;
  for (int64_t i = 0; i < met.count; ++i, from += x.stride * kWidth, weights += kTaps * kWidth) {
    add_row<kTaps, kStep, kOutputs>(from, weights, sums);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kOutputs; ++t) store(row + t * kStepOut * kWidth, sums[t]);
}

// `columns` numbers of a row; `row` has room for a multiple of kTile.
template <int kTaps, int kStep, int kStepOut>
void row_of(const Plane& x, const Met& met, int64_t column, int64_t columns, const float* weights, float* row) {
  int64_t w = 0;
  for (; w + kWideTile <= columns; w += kWideTile) {
    row_tile<kTaps, kStep, kStepOut, kWideTile>(x, met, column + kStep * w, weights, row + kStepOut * w * kWidth);
  }
  for (; w < columns; w += kTile) {
    row_tile<kTaps, kStep, kStepOut, kTile>(x, met, column + kStep * w, weights, row + kStepOut * w * kWidth);
  }
}

// Row h of plain(x), `columns` wide, by weights [K][K].
template <int K>
void plain_row(const Plane& x, int64_t h, int64_t columns, const float* weights, float* row) {
  row_of<K, 1, 1>(x, met(h - K / 2, K, x.rows), -(K / 2), columns, weights, row);
}

// Row h of down(x), by weights [K + 1][K + 1].
template <int K>
void down_row(const Plane& x, int64_t h, int64_t columns, const float* weights, float* row) {
  row_of<K + 1, 2, 1>(x, met(2 * h - K / 2, K + 1, x.rows), -(K / 2), columns, weights, row);
}

// Taps of up for outputs of a parity: tap t is v[last_tap - 2t], and meets input j + first_input + t for output 2j.
constexpr int last_tap(int k, int parity) { return (parity + k / 2) % 2 == 1 ? k : k - 1; }
constexpr int first_input(int k, int parity) { return (parity + k / 2 - last_tap(k, parity)) / 2; }

// Row h of up(y), by weights [row parity][column parity][(K + 1) / 2][(K + 1) / 2]; `row` has room for 2 * kTile more.
template <int K>
void up_row(const Plane& y, int64_t h, int64_t columns, const float* weights, float* row) {
  constexpr int kTaps = (K + 1) / 2;
  const Met rows = met(h / 2 + first_input(K, h % 2), kTaps, y.rows);
  weights += h % 2 * 2 * kTaps * kTaps * kWidth;
  row_of<kTaps, 1, 2>(y, rows, first_input(K, 0), (columns + 1) / 2, weights, row);
  row_of<kTaps, 1, 2>(y, rows, first_input(K, 1), columns / 2, weights + kTaps * kTaps * kWidth, row + kWidth);
}

// So many sums side by side for each product with a shifted x, so that additions need not wait for each other.
template <int kTaps>
constexpr int kChains = kTaps <= (kWidth == 16 ? 8 : 4) ? 2 : 1;

// sums[.][j] += sum over t of y[t] x[kStep * t + j], for kTile numbers of y.
template <int kTaps, int kStep>
inline __attribute__((always_inline)) void add_products(const float* x, const float* y,
                                                        Floats (&sums)[kChains<kTaps>][kTaps]) {
  Floats pixels[kTile];
#pragma GCC unroll 4
  for (int t = 0; t < kTile; ++t) pixels[t] = load(y + t * kWidth);
#pragma GCC unroll 24
  for (int at = 0; at < (kTile - 1) * kStep + kTaps; ++at) {
    const Floats column = load(x + at * kWidth);
#pragma GCC unroll 4
    for (int t = 0; t < kTile; ++t) {
      const int j = at - t * kStep;
      if (j >= 0 && j < kTaps) {
        Floats& sum = sums[t % kChains<kTaps>][j];
        sum = multiply_add(column, pixels[t], sum);
      }
    }
  }
}

// totals[a][j] += sum over i, w of y[i, w] x[kStep * i + a - p, kStep * w + j - p], in strips of rows that stay in the
// first-level cache.
template <int K, int kStep>
void correlate(const Plane& x, const Plane& y, float* totals) {
  constexpr int kTaps = K + kStep - 1, p = K / 2;
  const int64_t strip = most(2, 24576 / kBytes / (kStep * x.stride + y.stride));
  for (int64_t h = 0; h < y.rows; h += strip) {
    const int64_t end = least(y.rows, h + strip);
    for (int a = 0; a < kTaps; ++a) {
      const int64_t from = most(h, (p - a + kStep - 1) / kStep);
      Floats sums[kChains<kTaps>][kTaps] = {};
      for (int64_t i = from; i < end && kStep * i + a - p < x.rows; ++i) {
        for (int64_t w = 0; w < y.columns; w += kTile) {
          add_products<kTaps, kStep>(x.at(kStep * i + a - p, kStep * w - p), y.at(i, w), sums);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) {
        float* const total = totals + (a * kTaps + j) * kWidth;
        store(total, load(total) + sums[0][j] + (kChains<kTaps> > 1 ? sums[kChains<kTaps> - 1][j] : Floats{}));
      }
    }
  }
}

}  // namespace
}  // namespace raccgan
