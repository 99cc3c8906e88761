// The convolutions of the depthwise passes: of a or s, and of g by the transpose, with the norm and the ReLUs applied
// as a tile is read and as its results are written. Sums over pixels are taken tile by tile; a launch of their own
// finishes them.
#pragma once

#include "images.h"
#include "norm.h"

namespace raccgan::cuda { namespace {
struct ConvolveArgs {
  NormedLayer layer;
  Image in;
  const float* packed;    // the weights, of `pack`
  int64_t rows, columns;  // of the result
  void* result;           // the convolution, or slope q: the gradient without the norm. Or null
  const void *x, *t;      // where the result is the gradient of a; t or null
  float* q;               // or null
  float* partial;         // [N, tiles, kSums, C]
};

RACCGAN_HOST_DEVICE constexpr int warps_of(Resize resize) { return resize == Resize::kDown ? 4 : 8; }

// Multiplies a row of results, the gradient of a, by [a > 0] to q, writes it, and adds up q, q (h - center) and q t.
template <class T, int kWide>
__device__ void pass_back(const ConvolveArgs& args, const Coefficients& by, int64_t n, int64_t channel, int row,
                          int column, const float (&results)[kWide], float (&sums)[kSums]) {
  const DepthwiseLayer& s = args.layer;
  if (row >= args.rows || channel >= s.c) return;
  const int lane = threadIdx.x % kWarp, width = static_cast<int>(args.columns) - column;
  const float center = by.center[lane], slope = by.slope[lane], offset = by.offset[lane];
  const int64_t first = ((n * args.rows + row) * args.columns + column) * s.c + channel;
  const int channels = static_cast<int>(s.c);
  const auto* const x = static_cast<const typename T::Stored*>(args.x);
  const auto* const t = static_cast<const typename T::Stored*>(args.t);
  constexpr int kAhead = 4;  // loads before the first one is waited for
#pragma unroll
  for (int from = 0; from < kWide; from += kAhead) {
    typename T::Stored xs[kAhead], ts[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = first + (from + i) * channels;
      if (from + i < width) xs[i] = x[at];
      if (from + i < width && t) ts[i] = t[at];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (from + i >= width) return;
      const float v = T::widen(xs[i]);
      const bool first_passes = !s.pre_relu || v > 0.0f;
      const float d = (s.pre_relu ? relu(v) : v) - center;
      const bool passes = !s.relu || fmaf(d, slope, offset) > 0.0f;
      const float q = passes ? results[from + i] : 0.0f;
      sums[0] += q;
      sums[1] = fmaf(q, d, sums[1]);
      if (t && first_passes) sums[2] = fmaf(q, T::widen(ts[i]), sums[2]);
      const int64_t at = first + (from + i) * channels;
      if (args.q) args.q[at] = q;
      if (args.result) {
        static_cast<typename T::Stored*>(args.result)[at] = T::narrow(first_passes ? slope * q : 0.0f);
      }
    }
  }
}

template <class T, int kWide>
__device__ void write(const ConvolveArgs& args, int64_t n, int64_t channel, int row, int column,
                      const float (&results)[kWide]) {
  if (row >= args.rows || channel >= args.layer.c) return;
  auto* const to = static_cast<typename T::Stored*>(args.result) +
                   ((n * args.rows + row) * args.columns + column) * args.layer.c + channel;
  const int width = static_cast<int>(args.columns) - column, channels = static_cast<int>(args.layer.c);
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    if (i < width) to[i * channels] = T::narrow(results[i]);
  }
}

template <template <class, int> class Reader>
constexpr bool kBack = std::is_same_v<Reader<Float32, 1>, Unchanged<Float32, 1>>;

// Blocks a multiprocessor: as many as it has registers for without a spill.
RACCGAN_HOST_DEVICE constexpr int resident(Resize resize, bool back) {
  return (back && resize == Resize::kUp ? 512 : 768) / (warps_of(resize) * kWarp);
}

// L a or L s; or, by the reader of an image itself, L^T g, q and the sums of q.
template <template <class, int> class Reader, class T, int K, Resize kResize>
__global__ void __launch_bounds__(warps_of(kResize) * kWarp, resident(kResize, kBack<Reader>))
    convolve(ConvolveArgs args) {
  using Shape = Tile<K, kResize, warps_of(kResize)>;
  auto& shared = *static_cast<Operands<Shape>*>(launched_shared());
  const NormedLayer& s = args.layer;
  const Position<Shape> at{args.rows, args.columns, static_cast<unsigned>(ceiling(s.c, kWarp))};
  shared.template load<Reader, T>(s, args.in, args.packed, {at.n, at.part, at.row, at.column});
  float sums[kThreadRows][Shape::kWide] = {};
  convolve_rows<K, kResize, Shape>(shared.tile, shared.weights, sums);

  const int64_t channel = static_cast<int64_t>(at.part) * kWarp + threadIdx.x % kWarp;
  const int row = at.row + threadIdx.x / kWarp * kThreadRows;
  if constexpr (!kBack<Reader>) {
#pragma unroll
    for (int o = 0; o < kThreadRows; ++o) write<T>(args, at.n, channel, row + o, at.column, sums[o]);
  } else {
    float totals[kSums] = {};
#pragma unroll
    for (int o = 0; o < kThreadRows; ++o) {
      pass_back<T>(args, shared.by, at.n, channel, row + o, at.column, sums[o], totals);
    }
    totals[1] *= shared.by.root[threadIdx.x % kWarp];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const double sum = add_warps(totals[i], reinterpret_cast<double*>(shared.tile), Shape::kWarps);
      if (threadIdx.x < kWarp && channel < s.c) {
        args.partial[((at.n * at.tiles + at.tile) * kSums + i) * s.c + channel] = static_cast<float>(sum);
      }
    }
  }
}

template <template <class, int> class Reader> void convolve_by(Queue& queue, Resize resize, const ConvolveArgs& args) {
  const int warps = warps_of(resize);
  const int64_t blocks = args.layer.n * tiles(resize, warps, args.rows, args.columns) * ceiling(args.layer.c, kWarp);
  for_kernel(args.layer.k, resize, [&](auto k, auto constant) {
    constexpr Resize kResize = constant;
    for_dtype(args.layer.dtype, [&](auto element) {
      queue.with_shared(sizeof(Operands<Tile<k, kResize, warps_of(kResize)>>),
                        convolve<Reader, decltype(element), k, kResize>, blocks, warps * kWarp, args);
    });
  });
}
}}  // namespace raccgan::cuda
