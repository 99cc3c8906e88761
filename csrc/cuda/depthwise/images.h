// The inputs of the convolutions in tiles.h: tiles of an image, after norm and ReLU, and the weights with the resizing
// folded in.
#pragma once

#include "../passes.h"
#include "tiles.h"

namespace raccgan::cuda { namespace {
// A layer with the moments of each sample's channel, [N, C] each: null without the norm, those of t and t z without t.
struct NormedLayer : DepthwiseLayer {
  const float *mean, *var, *t_mean, *tz_mean;
};

struct Image {
  const void *data, *t;  // t or null
  int64_t rows, columns;
  bool wide;  // whether it allows 16-byte loads
};

// a = relu((h - center) slope + offset), s = [a > 0] (slope t + by_value (h - center) + constant), z = (h - center)
// root, for a block's 32 channels of a sample.
struct alignas(16) Coefficients {
  float center[kWarp], root[kWarp], slope[kWarp], offset[kWarp], by_value[kWarp], constant[kWarp];

  // The first warp writes them; the other warps see them after the next barrier.
  __device__ void find(const NormedLayer& s, int64_t n, int64_t chunk) {
    const int lane = threadIdx.x;
    const int64_t channel = chunk * kWarp + lane, at = n * s.c + channel;
    if (lane >= kWarp) return;
    const bool there = channel < s.c, normalised = there && s.mean, tangent = normalised && s.t_mean;
    center[lane] = normalised ? s.mean[at] : 0.0f;
    root[lane] = normalised ? 1.0f / sqrtf(s.var[at] + s.eps) : 1.0f;
    slope[lane] = root[lane] * (there && s.scale ? s.scale[at] : 1.0f);
    offset[lane] = there && s.shift ? s.shift[at] : 0.0f;
    by_value[lane] = tangent ? -slope[lane] * root[lane] * s.tz_mean[at] : 0.0f;
    constant[lane] = tangent ? -slope[lane] * s.t_mean[at] : 0.0f;
  }
};

// Readers of V of the block's channels, from `lane` on, and of a tile's pixels, from `first` on: of an image itself, of
// a, or of s. `fetch` loads, `finish` applies the norm and the ReLUs.
template <class T, int V> struct Unchanged {
  using Raw = Packed<T, V>;
  const typename T::Stored *data, *first;

  __device__ Unchanged(const void* data, int64_t first)
      : data(static_cast<const typename T::Stored*>(data)), first(this->data + first) {}
  __device__ Unchanged(const DepthwiseLayer&, const Image& image, int64_t first, const Coefficients&, int)
      : Unchanged(image.data, first) {}

  // Pixels outside of the image load a valid address instead, and the caller drops the value: no load waits for a
  // branch.
  __device__ Raw fetch(bool inside, unsigned offset) const { return cuda::fetch<T, V>(inside ? first + offset : data); }
  __device__ void finish(const Raw& raw, float (&v)[V]) const { widen<T>(raw, v); }
};

// a. Keeps its coefficients in registers, since a thread reads many pixels.
template <class T, int V> struct Activated : Unchanged<T, V> {
  float least_input, least_result;  // that the two ReLUs pass
  float center[V], slope[V], offset[V];

  __device__ Activated(const DepthwiseLayer& s, const Image& image, int64_t first, const Coefficients& by, int lane)
      : Unchanged<T, V>(image.data, first), least_input(s.pre_relu ? 0.0f : -INFINITY),
        least_result(s.relu ? 0.0f : -INFINITY) {
    load_floats(by.center + lane, center);
    load_floats(by.slope + lane, slope);
    load_floats(by.offset + lane, offset);
  }

  __device__ void finish(const Packed<T, V>& raw, float (&v)[V]) const {
    widen<T>(raw, v);
    for (int i = 0; i < V; ++i) {
      v[i] = larger(fmaf(larger(v[i], least_input) - center[i], slope[i], offset[i]), least_result);
    }
  }
};

// s. Reads its coefficients for each pixel: in registers they would displace the sums.
template <class T, int V> struct Tangent {
  struct Raw {
    Packed<T, V> x, t;
  };
  Unchanged<T, V> x, t;
  bool pre_relu, relu;
  const Coefficients& by;
  int lane;

  __device__ Tangent(const DepthwiseLayer& s, const Image& image, int64_t first, const Coefficients& by, int lane)
      : x(image.data, first), t(image.t, first), pre_relu(s.pre_relu), relu(s.relu), by(by), lane(lane) {}

  __device__ Raw fetch(bool inside, unsigned offset) const {
    return {x.fetch(inside, offset), t.fetch(inside, offset)};
  }
  __device__ void finish(const Raw& raw, float (&v)[V]) const {
    float h[V], center[V], slope[V], offset[V], by_value[V], constant[V];
    widen<T>(raw.x, h);
    widen<T>(raw.t, v);
    load_floats(by.center + lane, center);
    load_floats(by.slope + lane, slope);
    load_floats(by.offset + lane, offset);
    load_floats(by.by_value + lane, by_value);
    load_floats(by.constant + lane, constant);
    for (int i = 0; i < V; ++i) {
      const float d = (pre_relu ? cuda::relu(h[i]) : h[i]) - center[i];
      const float from_t = pre_relu && !(h[i] > 0.0f) ? 0.0f : v[i];
      const float u = fmaf(from_t, slope[i], fmaf(d, by_value[i], constant[i]));
      v[i] = relu && !(fmaf(d, slope[i], offset[i]) > 0.0f) ? 0.0f : u;
    }
  }
};

// A tile's sample, 32 of its channels, and its first pixel, which may lie outside of the image.
struct Place {
  int64_t n, chunk;
  int row, column;
};

// Fills a tile: the pixels [kRows][kColumns] of `place`, zero outside of the image. A thread has kLoads loads in flight
// before it waits for the first one. Steps from pixel to pixel are sums of 32 bits: addresses of 64 bits took more
// instructions than the values.
template <template <class, int> class Reader, class T, int V, int kRows, int kColumns, int kBlock, int kLoads>
__device__ void fill_by(const DepthwiseLayer& s, const Image& image, const Coefficients& by, const Place& place,
                        float* tile) {
  using Raw = typename Reader<T, V>::Raw;
  constexpr int kLanes = kWarp / V, kEach = kBlock / kLanes, kAhead = kLoads * sizeof(Packed<T, V>) / sizeof(Raw);
  const int lane = threadIdx.x % kLanes * V;
  const int64_t channel = place.chunk * kWarp + lane;
  const int64_t pixel = (place.n * image.rows + place.row) * image.columns + place.column;
  const Reader<T, V> reader(s, image, pixel * s.c + channel, by, lane);
  const int first_row = place.row, first_column = place.column;
  const unsigned rows = channel < s.c ? static_cast<unsigned>(image.rows) : 0;  // none of a channel beyond C
  const unsigned columns = static_cast<unsigned>(image.columns), step = static_cast<unsigned>(s.c);
  int row = threadIdx.x / kLanes / kColumns, column = threadIdx.x / kLanes % kColumns;
  tile += threadIdx.x / kLanes * kWarp + lane;
#pragma unroll 1
  while (row < kRows) {
    Raw raw[kAhead];
    bool inside[kAhead], in_tile[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      in_tile[i] = row < kRows;
      inside[i] = in_tile[i] && static_cast<unsigned>(first_row + row) < rows &&
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
      if (in_tile[i]) store_floats(tile, v);
    }
  }
}

template <template <class, int> class Reader, class T, int kRows, int kColumns, int kBlock, int kLoads>
__device__ void fill(const DepthwiseLayer& s, const Image& image, const Coefficients& by, const Place& place,
                     float* tile) {
  if (image.wide) {
    fill_by<Reader, T, kVector<T>, kRows, kColumns, kBlock, kLoads>(s, image, by, place, tile);
  } else {
    fill_by<Reader, T, 1, kRows, kColumns, kBlock, kLoads>(s, image, by, place, tile);
  }
}

template <class Shape> struct Operands {
  alignas(16) float tile[Shape::kRows * Shape::kColumns * kWarp];
  float weights[Shape::kTaps * Shape::kTaps * kWarp];
  Coefficients by;

  // The tile of results at `place`, and the weights [taps, taps, C] that `pack` made.
  template <template <class, int> class Reader, class T>
  __device__ void load(const NormedLayer& s, const Image& image, const float* packed, const Place& place) {
    constexpr int kBlock = Shape::kWarps * kWarp;
    const int64_t channel = place.chunk * kWarp + threadIdx.x % kWarp;
    by.find(s, place.n, place.chunk);
    for (int i = threadIdx.x; i < Shape::kTaps * Shape::kTaps * kWarp; i += kBlock) {
      weights[i] = channel < s.c ? packed[i / kWarp * s.c + channel] : 0.0f;
    }
    __syncthreads();
    const Place inputs{place.n, place.chunk, Shape::first(place.row), Shape::first(place.column)};
    fill<Reader, T, Shape::kRows, Shape::kColumns, kBlock, 4>(s, image, by, inputs, tile);
    __syncthreads();
  }
};

// packed [taps, taps, C]: w, flipped where `transposed`; or v of ops/depthwise.h, the same for both.
__global__ void __launch_bounds__(kThreads) pack(DepthwiseLayer s, bool transposed, float* packed) {
  const int64_t n = taps(s), size = s.k * s.k, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n * n * s.c) return;
  const int64_t tap = i / s.c;
  const float* const w = s.weight + i % s.c * size;
  packed[i] = s.resize != Resize::kNone ? folded(s, w, tap / n, tap % n) : w[transposed ? size - 1 - tap : tap];
}

inline void pack_weights(Queue& queue, const DepthwiseLayer& s, bool transposed, float* packed) {
  queue(pack, ceiling(taps(s) * taps(s) * s.c, kThreads), kThreads, s, transposed, packed);
}

// The memory that a layer's moments take, none without the norm.
struct LayerMoments {
  const DepthwiseLayer& s;
  const void* x;
  Scratch& scratch;
  MomentsArgs args{s.n, s.h * s.w, s.c, s.dtype, x, s.pre_relu};
  float *mean = scratch.take(s.n * s.c, s.normalise), *var = scratch.take(s.n * s.c, s.normalise);
  float* sums = scratch.take(moments_floats(args), s.normalise);

  void find(Queue& queue) const {
    if (mean) queue.take(moments(args, sums, mean, var, queue.device, queue.stream));
  }
};

// The kernels count rows of an image, and values from a tile's first pixel on, in 32 bits.
inline const char* too_large(const DepthwiseLayer& s) {
  const bool fits = s.h < INT64_C(1) << 29 && s.w * s.c < INT64_C(1) << 24;
  return fits ? nullptr : "an image has 2^29 rows or more, or rows of 2^24 values or more";
}

template <Resize kResize> using ResizeConstant = std::integral_constant<Resize, kResize>;

// run(k, resize) with the layer's kernel size and a resizing as constants.
template <class Run> void for_kernel(int64_t k, Resize resize, const Run& run) {
  const auto with_resize = [&](auto size) {
    switch (resize) {
      case Resize::kNone: run(size, ResizeConstant<Resize::kNone>{}); break;
      case Resize::kUp: run(size, ResizeConstant<Resize::kUp>{}); break;
      case Resize::kDown: run(size, ResizeConstant<Resize::kDown>{}); break;
    }
  };
  switch (k) {
    case 3: with_resize(Constant<3>{}); break;
    case 5: with_resize(Constant<5>{}); break;
    case 7: with_resize(Constant<7>{}); break;
  }
}
}}  // namespace raccgan::cuda
