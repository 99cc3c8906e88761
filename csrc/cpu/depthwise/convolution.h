// The depthwise convolution, its transpose and its correlation on planes, by kernel size and resizing.
#pragma once

#include "../kernels.h"
#include "../simd/lanes.h"
#include "../threads.h"

namespace raccgan::RACCGAN_TARGET {
struct Convolution {
  // Row h, `columns` wide, of the convolution of a plane; `row` has room for 2 * kTile columns more.
  using Row = void (*)(const Plane& x, int64_t h, int64_t columns, const float* weights, float* row);
  // Adds the correlation of the larger plane with the smaller one to totals [taps, taps].
  using Correlate = void (*)(const Plane& x, const Plane& y, float* totals);

  Row row, transposed_row;
  Correlate correlate;
};

Convolution convolution_of(const DepthwiseLayer& s);

// Floats of the weights of one block of channels: `row` takes the first half, `transposed_row` the second.
inline int64_t packed_block(const DepthwiseLayer& s) { return 2 * taps(s) * taps(s) * kWidth; }

// Writes `weight` of a layer in the order in which rows are convolved, packed_block floats for each block of channels.
void pack_weights(const DepthwiseLayer& s, float* packed);

// Writes totals [taps, taps] of a block of channels, a gradient of packed weights, as the gradient of w: to [C, k, k].
void unpack_totals(const DepthwiseLayer& s, const float* totals, int64_t block, float* to);
}  // namespace raccgan::RACCGAN_TARGET
