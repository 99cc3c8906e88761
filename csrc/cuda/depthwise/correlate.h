// The gradient of the depthwise weights: the correlation of a or s with g.
#pragma once

#include "images.h"

namespace raccgan::cuda { namespace {
struct CorrelateArgs {
  NormedLayer layer;
  Image small, large;
  int64_t splits;  // of the batch's tiles
  float* partial;  // [splits, taps, taps, C], out
};

// The warps have the taps of different rows, and add them up at the end in the memory of the tiles.
template <class Shape> union CorrelationShared {
  struct {
    alignas(16) float small[Shape::kRows * Shape::kWide * kWarp];
    alignas(16) float large[Shape::kLargeRows * Shape::kLargeColumns * kWarp];
    Coefficients by;
  } operands;
  float totals[Shape::kTaps * Shape::kTaps][Shape::kWarps][kWarp];
};

// A block has a warp of channels and a split: every `splits`-th tile of the batch.
template <template <class, int> class Small, template <class, int> class Large, class T, int K, int kStep>
__global__ void __launch_bounds__(CorrelationTile<K, kStep>::kWarps* kWarp, 2) correlate(CorrelateArgs args) {
  using Shape = CorrelationTile<K, kStep>;
  constexpr int kBlock = Shape::kWarps * kWarp, kTaps = Shape::kTaps;
  auto& all = *static_cast<CorrelationShared<Shape>*>(launched_shared());
  auto& shared = all.operands;
  const NormedLayer& s = args.layer;
  const int64_t chunks = ceiling(s.c, kWarp), chunk = blockIdx.x % chunks, split = blockIdx.x / chunks;
  const int64_t across = ceiling(args.small.columns, Shape::kWide);
  const int64_t tiles = ceiling(args.small.rows, Shape::kRows) * across;
  float totals[kTaps][kTaps] = {};
  for (int64_t i = split; i < s.n * tiles; i += args.splits) {
    const Place small{i / tiles, chunk, static_cast<int>(i % tiles / across) * Shape::kRows,
                      static_cast<int>(i % across) * Shape::kWide};
    const Place large{small.n, chunk, kStep * small.row - K / 2, kStep * small.column - K / 2};
    __syncthreads();
    shared.by.find(s, small.n, chunk);
    __syncthreads();
    fill<Small, T, Shape::kRows, Shape::kWide, kBlock, 2>(s, args.small, shared.by, small, shared.small);
    fill<Large, T, Shape::kLargeRows, Shape::kLargeColumns, kBlock, 2>(s, args.large, shared.by, large, shared.large);
    __syncthreads();
    correlate_rows<K, kStep>(shared.small, shared.large, totals);
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap) all.totals[tap][warp][lane] = totals[tap / kTaps][tap % kTaps];
  __syncthreads();
  const int64_t channel = chunk * kWarp + lane;
  if (channel >= s.c) return;
  for (int tap = warp; tap < kTaps * kTaps; tap += Shape::kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::kWarps; ++i) sum += all.totals[tap][i][lane];
    args.partial[(split * kTaps * kTaps + tap) * s.c + channel] = sum;
  }
}

// The gradient of w from that of packed weights, partial [splits, taps, taps, C]. A block has one tap of w and a warp
// of channels; its warps take the splits in turn.
__global__ void __launch_bounds__(kThreads)
    unpack(DepthwiseLayer s, int64_t splits, const float* partial, float* grad_w) {
  __shared__ double shared[kThreads];
  const int64_t chunks = ceiling(s.c, kWarp), n = taps(s), tap = blockIdx.x / chunks;
  const int64_t channel = blockIdx.x % chunks * kWarp + threadIdx.x % kWarp;
  double sum = 0.0;
  for (int64_t split = threadIdx.x / kWarp; split < splits && channel < s.c; split += kWarps) {
    add_unfolded(s, tap, partial + split * n * n * s.c + channel, s.c, sum);
  }
  sum = add_warps(sum, shared, kWarps);
  if (threadIdx.x >= kWarp || channel >= s.c) return;
  grad_w[channel * s.k * s.k + tap] = static_cast<float>(fold_factor(s.resize) * sum);
}

constexpr int64_t kCorrelateBlocks = 512;

// As many splits as fill a GPU, by the shape alone.
int64_t correlate_splits(const DepthwiseLayer& s) {
  const bool plain = s.resize == Resize::kNone, up = s.resize == Resize::kUp;
  const int64_t rows = up ? s.h : s.out(s.h), columns = up ? s.w : s.out(s.w);
  const int64_t down = ceiling(rows, plain ? CorrelationTile<3, 1>::kRows : CorrelationTile<3, 2>::kRows);
  const int64_t all = s.n * down * ceiling(columns, CorrelationTile<3, 1>::kWide);
  return least(ceiling(kCorrelateBlocks, ceiling(s.c, kWarp)), all);
}

// With x as the large image, or, where it is to be upsampled, the small one.
template <template <class, int> class ReaderOfX, class T, int K, Resize kResize> constexpr auto correlation() {
  if constexpr (kResize == Resize::kUp) {
    return correlate<ReaderOfX, Unchanged, T, K, 2>;
  } else {
    return correlate < Unchanged, ReaderOfX, T, K, kResize == Resize::kNone ? 1 : 2 > ;
  }
}

template <template <class, int> class ReaderOfX> void correlate_by(Queue& queue, const CorrelateArgs& args) {
  for_kernel(args.layer.k, args.layer.resize, [&](auto k, auto resize) {
    using Shape = CorrelationTile<k, resize == Resize::kNone ? 1 : 2>;
    for_dtype(args.layer.dtype, [&](auto element) {
      queue.with_shared(sizeof(CorrelationShared<Shape>), correlation<ReaderOfX, decltype(element), k, resize>(),
                        args.splits * ceiling(args.layer.c, kWarp), Shape::kWarps * kWarp, args);
    });
  });
}
}}  // namespace raccgan::cuda
