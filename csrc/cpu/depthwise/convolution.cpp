// Rows of a depthwise convolution, of its transpose and of its correlation, on planes in scratch memory (lanes.h), and
// the weights in the order in which they are read, with the resizing folded in.
// Kernel sizes k of 3, 5 and 7; p = k / 2; a plane is zero outside of itself.
//
//     plain    y[i] = sum over a of w[a] x[i + a - p]
//     down     y[i] = sum over b of v[b] x[2i + b - p]       v of ops/depthwise.h
//     up       x[m] = sum over i of v[m - 2i + p] y[i]       down transposed
//
// and likewise in the other dimension.
#include "convolution.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
constexpr int kWideTile = kManyRegisters ? 8 : 4;

// sums[t] += sum over j of weights[j] x[t * kStep + j].
template <int kTaps, int kStep, int kOutputs>
inline RACCGAN_INLINE void add_row(const float* x, const float* weights, Floats (&sums)[kOutputs]) {
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

// The rows of a plane under the taps of one output row: row `row` under tap `tap`, and so on for `count` of them.
struct TapRows {
  int64_t row, tap, count;
};

inline TapRows tap_rows(int64_t first, int64_t taps, int64_t rows) {
  const int64_t from = most(0, first);
  return {from, from - first, least(rows, first + taps) - from};
}

// kOutputs numbers of a row, kStepOut columns apart.
template <int kTaps, int kStep, int kStepOut, int kOutputs>
inline RACCGAN_INLINE void row_tile(const Plane& x, const TapRows& rows, int64_t column, const float* weights,
                                    float* row) {
  Floats sums[kOutputs];
#pragma GCC unroll 8
  for (int t = 0; t < kOutputs; ++t) sums[t] = Floats{};
  const float* from = x.at(rows.row, column);
  weights += rows.tap * kTaps * kWidth;
  for (int64_t i = 0; i < rows.count; ++i, from += x.stride * kWidth, weights += kTaps * kWidth) {
    add_row<kTaps, kStep, kOutputs>(from, weights, sums);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kOutputs; ++t) store(row + t * kStepOut * kWidth, sums[t]);
}

// `columns` numbers of a row; `row` has room for a multiple of kTile.
template <int kTaps, int kStep, int kStepOut>
void row_of(const Plane& x, const TapRows& rows, int64_t column, int64_t columns, const float* weights, float* row) {
  int64_t w = 0;
  for (; w + kWideTile <= columns; w += kWideTile) {
    row_tile<kTaps, kStep, kStepOut, kWideTile>(x, rows, column + kStep * w, weights, row + kStepOut * w * kWidth);
  }
  for (; w < columns; w += kTile) {
    row_tile<kTaps, kStep, kStepOut, kTile>(x, rows, column + kStep * w, weights, row + kStepOut * w * kWidth);
  }
}

// Row h of plain(x), `columns` wide, by weights [K][K].
template <int K> void plain_row(const Plane& x, int64_t h, int64_t columns, const float* weights, float* row) {
  row_of<K, 1, 1>(x, tap_rows(h - K / 2, K, x.rows), -(K / 2), columns, weights, row);
}

// Row h of down(x), by weights [K + 1][K + 1].
template <int K> void down_row(const Plane& x, int64_t h, int64_t columns, const float* weights, float* row) {
  row_of<K + 1, 2, 1>(x, tap_rows(2 * h - K / 2, K + 1, x.rows), -(K / 2), columns, weights, row);
}

// Row h of up(y), by weights [row parity][column parity][(K + 1) / 2][(K + 1) / 2]; `row` has room for 2 * kTile more.
template <int K> void up_row(const Plane& y, int64_t h, int64_t columns, const float* weights, float* row) {
  constexpr int kTaps = (K + 1) / 2;
  const TapRows rows = tap_rows(h / 2 + first_input(K, h % 2), kTaps, y.rows);
  weights += h % 2 * 2 * kTaps * kTaps * kWidth;
  row_of<kTaps, 1, 2>(y, rows, first_input(K, 0), (columns + 1) / 2, weights, row);
  row_of<kTaps, 1, 2>(y, rows, first_input(K, 1), columns / 2, weights + kTaps * kTaps * kWidth, row + kWidth);
}

// Sums side by side for each product with a shifted x, so that additions need not wait for each other.
template <int kTaps> constexpr int kChains = kTaps <= (kWidth == 16 ? 8 : 4) ? 2 : 1;

// sums[.][j] += sum over t of y[t] x[kStep * t + j], for kTile numbers of y.
template <int kTaps, int kStep>
inline RACCGAN_INLINE void add_products(const float* x, const float* y, Floats (&sums)[kChains<kTaps>][kTaps]) {
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

// totals[a][j] += sum over i, w of y[i, w] x[kStep * i + a - p, kStep * w + j - p], by tiles of rows that stay in the
// first-level cache.
template <int K, int kStep> void correlate(const Plane& x, const Plane& y, float* totals) {
  constexpr int kTaps = K + kStep - 1, p = K / 2;
  const int64_t tile = most(2, 24576 / kBytes / (kStep * x.stride + y.stride));
  for (int64_t h = 0; h < y.rows; h += tile) {
    const int64_t end = least(y.rows, h + tile);
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

template <int K> Convolution by_resize(Resize resize) {
  if (resize == Resize::kUp) return {up_row<K>, down_row<K>, correlate<K, 2>};
  if (resize == Resize::kDown) return {down_row<K>, up_row<K>, correlate<K, 2>};
  return {plain_row<K>, plain_row<K>, correlate<K, 1>};
}

// Reorders v [k + 1][k + 1] by output parity, as up_row takes it.
void pack_up(const Floats* v, int64_t k, float* to) {
  const int64_t half = (k + 1) / 2;
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      for (int64_t t = 0; t < half; ++t) {
        for (int64_t u = 0; u < half; ++u, to += kWidth) {
          store(to, v[(last_tap(k, row) - 2 * t) * (k + 1) + last_tap(k, column) - 2 * u]);
        }
      }
    }
  }
}

// plain[i]: tap i of w, for each lane.
void load_taps(const DepthwiseLayer& s, const float* w, const Lanes& l, Floats* plain) {
  const int64_t size = s.k * s.k;
  for_lanes(size, [&](auto lanes, int64_t i) RACCGAN_INLINE {
    Floats tile[kWidth] = {};
    for (int64_t lane = 0; lane < l.samples * l.channels; ++lane) {
      tile[lane] = lanes.load(w + (l.channel + lane % l.channels) * size + i);
    }
    transpose(tile);
    memcpy(plain + i, tile, least(kWidth, size - i) * sizeof *tile);
  });
}

void pack_block(const DepthwiseLayer& s, const float* w, const Lanes& l, float* to) {
  const int64_t size = s.k * s.k, n = taps(s);
  Floats plain[49], v[64];
  load_taps(s, w, l, plain);
  float* const transposed = to + n * n * kWidth;
  if (s.resize == Resize::kNone) {
    for (int64_t i = 0; i < size; ++i) store(to + i * kWidth, plain[i]);
    for (int64_t i = 0; i < size; ++i) store(transposed + i * kWidth, plain[size - 1 - i]);
    return;
  }
  for (int64_t i = 0; i < n * n; ++i) v[i] = folded(s, plain, i / n, i % n);
  const bool up = s.resize == Resize::kUp;
  pack_up(v, s.k, up ? to : transposed);
  float* const down = up ? transposed : to;
  for (int64_t i = 0; i < n * n; ++i) store(down + i * kWidth, v[i]);
}
}  // namespace

Convolution convolution_of(const DepthwiseLayer& s) {
  return s.k == 3 ? by_resize<3>(s.resize) : s.k == 5 ? by_resize<5>(s.resize) : by_resize<7>(s.resize);
}

void pack_weights(const DepthwiseLayer& s, float* packed) {
  for (int64_t block = 0; block < channel_blocks(s.c); ++block, packed += packed_block(s)) {
    pack_block(s, s.weight, lanes_of(s.c, block, 0, samples_a_vector(s.c)), packed);
  }
}

void unpack_totals(const DepthwiseLayer& s, const float* totals, int64_t block, float* to) {
  const Lanes l = lanes_of(s.c, block, 0, samples_a_vector(s.c));
  Floats v[64];
  for (int64_t i = 0; i < taps(s) * taps(s); ++i) v[i] = load(totals + i * kWidth);
  for (int64_t i = 0; i < s.k * s.k; ++i) {
    Floats sum{};
    add_unfolded(s, i, v, 1, sum);
    float lanes[kWidth];
    store(lanes, sum * fold_factor(s.resize));
    for (int64_t c = 0; c < l.channels; ++c) {
      float over_samples = 0;
      for (int64_t sample = 0; sample < l.samples; ++sample) over_samples += lanes[sample * l.channels + c];
      to[(l.channel + c) * s.k * s.k + i] = over_samples;
    }
  }
}
}  // namespace raccgan::RACCGAN_TARGET
