// What a depthwise convolution of depthwise_tiles.h reads: tiles of an image with the norm and the activation before it
// applied, and the weights with the resizing folded in.
#pragma once

#include "depthwise.h"
#include "tiles.h"
#include "../moments.h"

namespace raccgan {
namespace cuda {
namespace {

// ---- images ------------------------------------------------------------------------------------------------------

// Of each sample's channel, [N, C] each; null without the norm.
struct Norm {
  const float *mean, *var;
  const float *t_mean, *tz_mean;  // of t and of t z, for the double backward
};

struct Image {
  const void *data, *t;
  int64_t rows, columns;
};

// a = relu((h - centre) slope + offset), s = [a > 0] (slope t + by_value (h - centre) + constant), z = (h - centre) root,
// for a block's 32 channels of a sample.
struct alignas(16) Coefficients {
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

// The window of an image that a tile needs, from a pixel on that may lie before the image, for V channels a thread.
template <class T, int V>
struct Window {
  const typename T::Stored *data, *first;

  __device__ Window(const void* data, int64_t first)
      : data(static_cast<const typename T::Stored*>(data)), first(this->data + first) {}

  // Outside of the image something else of it, so that no load waits for a branch.
  __device__ Packed<T, V> fetch(bool inside, unsigned offset) const {
    return cuda::fetch<T, V>(inside ? first + offset : data);
  }
};

// How V channels of the block's from `lane` on are read: an image itself, a, or s. `fetch` begins, `finish` applies
// what stands before the convolution.
template <class T, int V>
struct Given {
  using Raw = Packed<T, V>;
  Window<T, V> window;

  __device__ Given(const DepthwiseLayer&, const Image& image, int64_t first, const Coefficients&, int)
      : window(image.data, first) {}

  __device__ Raw fetch(bool inside, unsigned offset) const { return window.fetch(inside, offset); }
  __device__ void finish(const Raw& raw, float (&v)[V]) const { widen<T>(raw, v); }
};

// Keeps its coefficients in registers, as it has many pixels to read.
template <class T, int V>
struct Activated {
  using Raw = Packed<T, V>;
  Window<T, V> window;
  float first, second;  // what the two ReLUs let through is not below these
  float centre[V], slope[V], offset[V];

  __device__ Activated(const DepthwiseLayer& s, const Image& image, int64_t at, const Coefficients& by, int lane)
      : window(image.data, at),
        first(s.rectify_first ? 0.0f : -INFINITY),
        second(s.rectify ? 0.0f : -INFINITY) {
    load_floats(by.centre + lane, centre);
    load_floats(by.slope + lane, slope);
    load_floats(by.offset + lane, offset);
  }

  __device__ Raw fetch(bool inside, unsigned offset) const { return window.fetch(inside, offset); }
  __device__ void finish(const Raw& raw, float (&v)[V]) const {
    widen<T>(raw, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = larger(fmaf(larger(v[i], first) - centre[i], slope[i], offset[i]), second);
  }
};

// Reads its coefficients each time: they would take the registers of what is summed.
template <class T, int V>
struct Tangent {
  struct Raw {
    Packed<T, V> x, t;
  };
  Window<T, V> x, t;
  bool rectify_first, rectify;
  const Coefficients& by;
  int lane;

  __device__ Tangent(const DepthwiseLayer& s, const Image& image, int64_t first, const Coefficients& by, int lane)
      : x(image.data, first),
        t(image.t, first),
        rectify_first(s.rectify_first),
        rectify(s.rectify),
        by(by),
        lane(lane) {}

  __device__ Raw fetch(bool inside, unsigned offset) const {
    return {x.fetch(inside, offset), t.fetch(inside, offset)};
  }
  __device__ void finish(const Raw& raw, float (&v)[V]) const {
    float h[V], centre[V], slope[V], offset[V], by_value[V], constant[V];
    widen<T>(raw.x, h);
    widen<T>(raw.t, v);
    load_floats(by.centre + lane, centre);
    load_floats(by.slope + lane, slope);
    load_floats(by.offset + lane, offset);
    load_floats(by.by_value + lane, by_value);
    load_floats(by.constant + lane, constant);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = (rectify_first ? relu(h[i]) : h[i]) - centre[i];
      const float from_t = rectify_first && !(h[i] > 0.0f) ? 0.0f : v[i];
      const float u = fmaf(from_t, slope[i], fmaf(d, by_value[i], constant[i]));
      v[i] = rectify && !(fmaf(d, slope[i], offset[i]) > 0.0f) ? 0.0f : u;
    }
  }
};

// 32 channels from `chunk` of sample n, the pixels [kRows][kColumns] from (row, column) on, zero outside of the image.
// A thread has kLoads loads on their way before it waits for the first one. It steps from pixel to pixel by sums of 32
// bits: addresses of 64 took more instructions than the values.
template <template <class, int> class Reader, class T, int V, int kRows, int kColumns, int kBlock, int kLoads>
__device__ void fill_by(const DepthwiseLayer& s, const Image& image, const Coefficients& by, int64_t n, int64_t chunk,
                        int first_row, int first_column, float* tile) {
  using Raw = typename Reader<T, V>::Raw;
  constexpr int kLanes = kWarp / V, kEach = kBlock / kLanes, kAhead = kLoads * sizeof(Packed<T, V>) / sizeof(Raw);
  const int lane = threadIdx.x % kLanes * V;
  const int64_t channel = chunk * kWarp + lane, pixel = (n * image.rows + first_row) * image.columns + first_column;
  const Reader<T, V> reader(s, image, pixel * s.c + channel, by, lane);
  const unsigned rows = channel < s.c ? static_cast<unsigned>(image.rows) : 0;  // none of a channel that is not there
  const unsigned columns = static_cast<unsigned>(image.columns), step = static_cast<unsigned>(s.c);
  int row = threadIdx.x / kLanes / kColumns, column = threadIdx.x / kLanes % kColumns;
  tile += threadIdx.x / kLanes * kWarp + lane;
#pragma unroll 1
  while (row < kRows) {
    Raw raw[kAhead];
    bool inside[kAhead], wanted[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      wanted[i] = row < kRows;
      inside[i] = wanted[i] && static_cast<unsigned>(first_row + row) < rows &&
                  static_cast<unsigned>(first_column + column) < columns;
      raw[i] = reader.fetch(inside[i], (row * columns + column) * step);
      row += kEach / kColumns;
      column += kEach % kColumns;
      if (column >= kColumns) column -= kColumns, ++row;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i, tile += kEach * kWarp) {
      float v[V] = {};
      if (inside[i]) reader.finish(raw[i], v);
      if (wanted[i]) store_floats(tile, v);
    }
  }
}

// `wide`: whether the image allows 16-byte loads.
template <template <class, int> class Reader, class T, int kRows, int kColumns, int kBlock, int kLoads>
__device__ void fill(const DepthwiseLayer& s, const Image& image, bool wide, const Coefficients& by, int64_t n,
                     int64_t chunk, int first_row, int first_column, float* tile) {
  if (wide) {
    constexpr int V = kVector<T>;
    fill_by<Reader, T, V, kRows, kColumns, kBlock, kLoads>(s, image, by, n, chunk, first_row, first_column, tile);
  } else {
    fill_by<Reader, T, 1, kRows, kColumns, kBlock, kLoads>(s, image, by, n, chunk, first_row, first_column, tile);
  }
}

// ---- what a block convolves --------------------------------------------------------------------------------------

template <class Shape>
struct Operands {
  alignas(16) float tile[Shape::kRows * Shape::kColumns * kWarp];
  float weights[Shape::kTaps * Shape::kTaps * kWarp];
  Coefficients by;

  // The tile of results (row, column) of 32 channels of a sample, and the weights [taps, taps, C] that `pack` made.
  template <template <class, int> class Reader, class T>
  __device__ void load(const DepthwiseLayer& s, const Norm& norm, const Image& image, bool wide, const float* packed,
                       int64_t n, int64_t chunk, int row, int column) {
    constexpr int kBlock = Shape::kWarps * kWarp;
    const int64_t channel = chunk * kWarp + threadIdx.x % kWarp;
    find(s, norm, n, chunk, by);
    for (int i = threadIdx.x; i < Shape::kTaps * Shape::kTaps * kWarp; i += kBlock) {
      weights[i] = channel < s.c ? packed[i / kWarp * s.c + channel] : 0.0f;
    }
    __syncthreads();
    fill<Reader, T, Shape::kRows, Shape::kColumns, kBlock, 4>(s, image, wide, by, n, chunk, Shape::first(row),
                                                              Shape::first(column), tile);
    __syncthreads();
  }
};

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

// Tiles of a sample's results: Block<K, form> is a Tile, as high and as wide for every K.
template <template <int, Form> class Block>
int64_t tiles(Form form, int64_t rows, int64_t columns) {
  const auto of = [&](auto shape) {
    using Shape = decltype(shape);
    return ceiling(rows, Shape::kHigh) * ceiling(columns, Shape::kStrip);
  };
  if (form == Form::kDown) return of(Block<3, Form::kDown>{});
  return form == Form::kUp ? of(Block<3, Form::kUp>{}) : of(Block<3, Form::kPlain>{});
}

// A row's place in an image and a value's in a window of it are counted in 32 bits.
inline const char* too_large(const DepthwiseLayer& s) {
  const bool fits = s.h < INT64_C(1) << 29 && s.w * s.c < INT64_C(1) << 24;
  return fits ? nullptr : "an image has 2^29 rows or more, or rows of 2^24 values or more";
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
