// The depthwise weights in the order in which convolution.cpp reads them, with the resizing folded in, and back.
#include "convolution.h"

namespace raccgan {
namespace {

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
      tile[lane] = lanes.template load<Float32>(w + (l.channel + lane % l.channels) * size + i);
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

namespace RACCGAN_TARGET {

int64_t packed_floats(const DepthwiseLayer& layer) { return channel_blocks(layer.c) * packed_block(layer); }

void pack_weights(const DepthwiseLayer& layer, const float* w, float* packed) {
  for (int64_t block = 0; block < channel_blocks(layer.c); ++block, packed += packed_block(layer)) {
    pack_block(layer, w, lanes_of(layer.c, block, 0, samples_a_vector(layer.c)), packed);
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
      to[i * s.c + l.channel + c] = over_samples;
    }
  }
}

}  // namespace RACCGAN_TARGET
}  // namespace raccgan
