// What a depthwise convolution of depthwise_tiles.h reads: tiles of an image with the norm and the activation before it
// applied, and the weights with the resizing folded in.
#pragma once

#include "depthwise_separable.h"
#include "depthwise_tiles.h"
#include "moments.h"

namespace raccgan {
namespace cuda {
namespace {

// ---- images ------------------------------------------------------------------------------------------------------

// Of each sample's channel, [N, C] each; null without the norm.
struct Norm {
  const float *mean, *var;
  const float *t_mean, *tz_mean;  // of t and of t z, for the double backward
};

enum class Reading : int32_t { kGiven, kActivated, kTangent };  // data itself; a; s

struct Image {
  Reading reading;
  const void *data, *t;
  int64_t rows, columns;
};

// a = relu((h - centre) slope + offset), s = [a > 0] (slope t + by_value (h - centre) + constant), z = (h - centre) root,
// for a block's 32 channels of a sample.
struct Coefficients {
  float centre[kWarp], root[kWarp], slope[kWarp], offset[kWarp], by_value[kWarp], constant[kWarp];
};

// The first warp finds them; the others see them after the next barrier.
__device__ void find(const DepthwiseLayer& s, const Norm& norm, int64_t n, int64_t chunk, Coefficients& by) {
  const int lane = threadIdx.x;
  const int64_t channel = chunk * kWarp + lane, at = n * s.c + channel;
  if (lane >= kWarp) return;
  const bool there = channel < s.c, normalised = there && norm.mean, tangent = normalised && norm.t_mean;
  by.centre[lane] = normalised ? norm.mean[at] : 0.0f;
  by.root[lane] = normalised ? 1.0f / sqrtf(norm.var[at] + s.eps) : 1.0f;
  by.slope[lane] = by.root[lane] * (there && s.scale ? s.scale[at] : 1.0f);
  by.offset[lane] = there && s.shift ? s.shift[at] : 0.0f;
  by.by_value[lane] = tangent ? -by.slope[lane] * by.root[lane] * norm.tz_mean[at] : 0.0f;
  by.constant[lane] = tangent ? -by.slope[lane] * norm.t_mean[at] : 0.0f;
}

// V channels of the block's from `lane` on, at a place in memory.
template <class T, int V>
__device__ void read(const DepthwiseLayer& s, const Image& image, const Coefficients& by, int lane, int64_t at,
                     float (&v)[V]) {
  load<T, V>(static_cast<const typename T::Stored*>(image.data) + at, v);
  if (image.reading == Reading::kGiven) return;
  float centre[V], slope[V], offset[V];
  load_floats(by.centre + lane, centre);
  load_floats(by.slope + lane, slope);
  load_floats(by.offset + lane, offset);
  if (image.reading == Reading::kActivated) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = (s.rectify_first ? relu(v[i]) : v[i]) - centre[i];
      v[i] = fmaf(d, slope[i], offset[i]);
      if (s.rectify) v[i] = relu(v[i]);
    }
    return;
  }
  float t[V], by_value[V], constant[V];
  load<T, V>(static_cast<const typename T::Stored*>(image.t) + at, t);
  load_floats(by.by_value + lane, by_value);
  load_floats(by.constant + lane, constant);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float d = (s.rectify_first ? relu(v[i]) : v[i]) - centre[i];
    const float from_t = s.rectify_first && !(v[i] > 0.0f) ? 0.0f : t[i];
    const float u = fmaf(from_t, slope[i], fmaf(d, by_value[i], constant[i]));
    v[i] = s.rectify && !(fmaf(d, slope[i], offset[i]) > 0.0f) ? 0.0f : u;
  }
}

// 32 channels from `chunk` of sample n, the pixels [kRows][kColumns] from (row, column) on, zero outside of the image.
template <class T, int V, int kRows, int kColumns, int kBlock>
__device__ void fill(const DepthwiseLayer& s, const Image& image, const Coefficients& by, int64_t n, int64_t chunk,
                     int64_t first_row, int64_t first_column, float* tile) {
  constexpr int kLanes = kWarp / V;
  const int lane = threadIdx.x % kLanes * V;
  const int64_t channel = chunk * kWarp + lane;
  const bool there = channel < s.c;
#pragma unroll 2
  for (int i = threadIdx.x / kLanes; i < kRows * kColumns; i += kBlock / kLanes) {
    const int64_t row = first_row + i / kColumns, column = first_column + i % kColumns;
    float v[V] = {};
    if (there && row >= 0 && row < image.rows && column >= 0 && column < image.columns) {
      read<T, V>(s, image, by, lane, ((n * image.rows + row) * image.columns + column) * s.c + channel, v);
    }
    store_floats(tile + i * kWarp + lane, v);
  }
}

// ---- weights -----------------------------------------------------------------------------------------------------

// Taps a side: of w, or of w summed over 2 x 2 neighbours, which is the convolution together with its resizing.
__host__ __device__ inline int64_t taps(const DepthwiseLayer& s) { return s.resize == Resize::kPlain ? s.k : s.k + 1; }

// packed [taps, taps, C]: w, flipped where `transposed`; or v, the same for the convolution and its transpose.
__global__ void __launch_bounds__(kThreads) pack(DepthwiseLayer s, bool transposed, float* packed) {
  const int64_t n = taps(s), size = s.k * s.k, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n * n * s.c) return;
  const int64_t tap = i / s.c;
  const float* const w = s.weight + i % s.c * size;
  if (s.resize == Resize::kPlain) {
    packed[i] = w[transposed ? size - 1 - tap : tap];
    return;
  }
  const bool up = s.resize == Resize::kUp;  // is the transpose of down by the flipped kernel
  float sum = 0.0f;
  for (int64_t r = 0; r < 2; ++r) {
    for (int64_t c = 0; c < 2; ++c) {
      const int64_t row = tap / n - r, column = tap % n - c;
      if (row < 0 || row >= s.k || column < 0 || column >= s.k) continue;
      const int64_t at = row * s.k + column;
      sum += w[up ? size - 1 - at : at];
    }
  }
  packed[i] = up ? sum : 0.25f * sum;
}

// ---- host --------------------------------------------------------------------------------------------------------

inline Form form_of(Resize resize, bool transposed) {
  if (resize == Resize::kPlain) return Form::kPlain;
  return (resize == Resize::kUp) != transposed ? Form::kUp : Form::kDown;
}

// Tiles of a sample's results.
inline int64_t tiles(Form form, int64_t rows, int64_t columns) {
  static_assert(Tile<3, Form::kPlain>::kWarps == Tile<3, Form::kUp>::kWarps);
  static_assert(Tile<3, Form::kPlain>::kStrip == Tile<3, Form::kUp>::kStrip);
  using Down = Tile<3, Form::kDown>;
  using Other = Tile<3, Form::kPlain>;
  if (form == Form::kDown) return ceiling(rows, Down::kWarps) * ceiling(columns, Down::kStrip);
  return ceiling(rows, Other::kWarps) * ceiling(columns, Other::kStrip);
}

// The pixels of each sample's channel, whose moments are the norm's.
inline Runs runs_of(const DepthwiseLayer& s, const void* x) {
  return {s.n, s.h * s.w, s.c, s.dtype, x, s.rectify_first};
}

// run(K) with the layer's kernel size as a constant.
template <class Run>
void for_size(int64_t k, const Run& run) {
  if (k == 3) run(std::integral_constant<int, 3>{});
  if (k == 5) run(std::integral_constant<int, 5>{});
  if (k == 7) run(std::integral_constant<int, 7>{});
}

}  // namespace
}  // namespace cuda
}  // namespace raccgan
