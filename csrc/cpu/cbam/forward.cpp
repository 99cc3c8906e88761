// CBAM on a CPU, forward.
//
//     gate[n, c]   = sigmoid(MLP(average over p of x) + MLP(max over p of x))
//     planes[n, p] = max and mean over c of x[n, p, c] gate[n, c]
//     s[n, p]      = k x k convolution of both planes;    scale, shift normalise it by its moments
//     y[n, p, c]   = x[n, p, c] gate[n, c] sigmoid(scale s[n, p] + shift)
//
// Three sweeps over x, of which the caller runs the second and the third while a sample is in a cache, wherever the
// norm couples no samples. A sweep goes over the pixels as they lie in memory, with all of their channels or many.
#include "planes.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
template <class T>
void to_channels_last_as(const CbamShape& s, const void* from_tensor, void* to_tensor, int64_t to_first, int64_t begin,
                         int64_t end) {
  const int64_t pixels = s.h * s.w;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(s, task);
    const auto* const from =
        static_cast<const typename T::Stored*>(from_tensor) + chunk.sample * pixels * s.c + chunk.first;
    auto* const to = static_cast<typename T::Stored*>(to_tensor) + chunk.in_tensor(s) - to_first * pixels * s.c;
    for_lanes(s.c, [&](auto rows, int64_t c) RACCGAN_INLINE {
      for_lanes(chunk.count(), [&](auto columns, int64_t p) RACCGAN_INLINE {
        Floats block[kWidth];
        const int64_t channels = least(kWidth, s.c - c), here = least(kWidth, chunk.count() - p);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i) {
          const auto* const row = from + (c + least(i, channels - 1)) * pixels + p;
          __builtin_prefetch(row + kAhead / kCbamLanes);
          block[i] = columns.template load<T>(row);
        }
        transpose(block);
        for (int64_t i = 0; i < here; ++i) rows.template store<T>(to + (p + i) * s.c + c, block[i]);
      });
    });
  }
}

constexpr int kPooled = kManyRegisters ? 8 : 4;  // vectors whose sums and maxima stay in registers

// Sums and maxima over `count` pixels of kCount vectors of channels. Pixel after pixel, as they lie in memory.
template <class T, int kCount, class Lanes>
void pool_vectors(const Lanes& lanes, const typename T::Stored* x, int64_t c, int64_t count, float* sums,
                  float* maxima) {
  Floats sum[kCount] = {}, max[kCount];
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) max[v] = all(-__builtin_inff());
  for (const auto* const end = x + count * c; x < end; x += c) {
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) {
      __builtin_prefetch(x + v * kWidth + 2 * kAhead, 0, 2);  // into the second-level cache
      const Floats u = lanes.template load<T>(x + v * kWidth);
      sum[v] += u;
      max[v] = larger(max[v], u);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) {
    lanes.store(sums + v * kWidth, sum[v]);
    lanes.store(maxima + v * kWidth, max[v]);
  }
}

// The same of all `vectors` whole vectors there are, at most kCount.
template <class T, int kCount = kPooled>
void pool_whole(int64_t vectors, const typename T::Stored* x, int64_t c, int64_t count, float* sums, float* maxima) {
  if constexpr (kCount > 0) {
    if (vectors < kCount) return pool_whole<T, kCount - 1>(vectors, x, c, count, sums, maxima);
    pool_vectors<T, kCount>(Whole{}, x, c, count, sums, maxima);
  }
}

template <class T> void pool_as(const CbamForwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(s, task);
    const auto* const x = chunk.of<T>(s, args.x);
    float* const sums = args.pooled + task * 2 * s.c;
    float* const maxima = sums + s.c;
    const int64_t whole = s.c / kWidth, rest = whole * kWidth;
    for (int64_t v = 0; v < whole; v += kPooled) {
      const int64_t at = v * kWidth;
      pool_whole<T>(least(kPooled, whole - v), x + at, s.c, chunk.count(), sums + at, maxima + at);
    }
    if (rest < s.c) pool_vectors<T, 1>(Rest{s.c - rest}, x + rest, s.c, chunk.count(), sums + rest, maxima + rest);
  }
}

// The average and the max of a sample from those of its chunks.
void add_chunks(const CbamForwardArgs& args, int64_t n) {
  const CbamShape& s = args.shape;
  const float* const pooled = args.pooled + n * chunks(s) * 2 * s.c;
  const double over = 1 / static_cast<double>(s.h * s.w);
  for_lanes(s.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
    Doubles sum{};
    Floats max = lanes.load(pooled + s.c + c);
    for (int64_t i = 0; i < chunks(s); ++i) {
      const float* const at = pooled + i * 2 * s.c + c;
      sum += widened(lanes.load(at));
      max = larger(max, lanes.load(at + s.c));
    }
    lanes.store(args.saved.average + n * s.c + c, narrowed(sum * over));
    lanes.store(args.saved.maximum + n * s.c + c, max);
  });
}

void find_gate(const CbamForwardArgs& args, int64_t n) {
  const CbamShape& s = args.shape;
  const CbamWeights& w = args.weights;
  float* const hidden = args.saved.hidden + n * 3 * s.r;
  const float* const inputs[2] = {args.saved.average + n * s.c, args.saved.maximum + n * s.c};
  for (int i = 0; i < 2; ++i) {
    matrix_product(w.reduce_weight, inputs[i], s.r, s.c, [&](auto lanes, int64_t r, Floats sum) {
      const Floats v = sum + lanes.load(w.reduce_bias + r);
      lanes.store(hidden + i * s.r + r, select((Words)(v < 0), Floats{}, v));
    });
  }
  float* const both = hidden + 2 * s.r;
  for (int64_t r = 0; r < s.r; ++r) both[r] = hidden[r] + hidden[s.r + r];
  matrix_product(w.expand_weight, both, s.c, s.r, [&](auto lanes, int64_t c, Floats sum) {
    const Floats bias = lanes.load(w.expand_bias + c);
    lanes.store(args.saved.gate + n * s.c + c, sigmoid(sum + (bias + bias)));
  });
}

template <class T> void gather_as(const CbamForwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  const int64_t size = s.h * s.w;
  const float over = 1.0f / static_cast<float>(s.c);
  // From the end: the caller's first sweep has left its last chunks in the nearest cache.
  for (int64_t task = end - 1; task >= begin; --task) {
    const Chunk chunk(s, task);
    const auto* const x = chunk.of<T>(s, args.x);
    const float* const gate = args.saved.gate + chunk.sample * s.c;
    float* const plane = args.saved.planes + chunk.in_planes(s);
    for_lanes(chunk.count(), [&](auto pixel_lanes, int64_t block) RACCGAN_INLINE {
      Floats maxima[kWidth] = {}, sums[kWidth] = {};
      for_pixels(0, least(kWidth, chunk.count() - block), [&](int64_t p, auto pixels) RACCGAN_INLINE {
        Floats max[pixels.count], sum[pixels.count];
#pragma GCC unroll 4
        for (int i = 0; i < pixels.count; ++i) max[i] = all(-__builtin_inff()), sum[i] = Floats{};
        for_lanes(s.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
          const Floats g = lanes.load(gate + c);
#pragma GCC unroll 4
          for (int i = 0; i < pixels.count; ++i) {
            const auto* const from = x + (block + p + i) * s.c + c;
            __builtin_prefetch(from + kAhead);
            const Floats u = lanes.template load<T>(from) * g;
            max[i] = larger(max[i], lanes.keep(u, all(-__builtin_inff())));
            sum[i] += u;
          }
        });
#pragma GCC unroll 4
        for (int i = 0; i < pixels.count; ++i) maxima[p + i] = max[i], sums[p + i] = sum[i];
      });
      pixel_lanes.store(plane + block, maxima_of(maxima));
      pixel_lanes.store(plane + size + block, sums_of(sums) * over);
    });
  }
}

CbamMoments moments_of(const float* v, int64_t count) {
  const auto sum_over = [&](float mean, bool squared) {
    Floats sum{};
    for_lanes(count, [&](auto lanes, int64_t i) RACCGAN_INLINE {
      const Floats d = lanes.keep(lanes.load(v + i) - mean, Floats{});
      sum += squared ? d * d : d;
    });
    return sum_of_lanes(sum);
  };
  const double over = static_cast<double>(count), mean = sum_over(0, false) / over;
  const float near = static_cast<float>(mean);
  const double rest = sum_over(near, false) / over;  // what rounding the mean has left
  return {near + rest, sum_over(near, true) - over * rest * rest};
}

template <class T> void apply_as(const CbamForwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(s, task);
    const auto* const x = chunk.of<T>(s, args.x);
    auto* const y = static_cast<typename T::Stored*>(args.y) + chunk.in_tensor(s);
    const float* const gate = args.saved.gate + chunk.sample * s.c;
    float spatial[kCbamChunk];
    find_gates(spatial_gate(args, chunk.sample), args.saved.scores + chunk.in_plane(s), chunk.count(), spatial);
    for (int64_t p = 0; p < chunk.count(); ++p) {
      const Floats here = all(spatial[p]);
      for_lanes(s.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
        const int64_t at = p * s.c + c;
        __builtin_prefetch(x + at + kAhead);
        __builtin_prefetch(y + at + kAhead, 1);
        const Floats g = lanes.load(gate + c);
        lanes.template store<T>(y + at, lanes.template load<T>(x + at) * g * here);
      });
    }
  }
}
}  // namespace

void cbam_to_channels_last(const CbamShape& shape, const void* from, void* to, int64_t to_first, int64_t begin,
                           int64_t end) {
  RACCGAN_OF_DTYPE(shape.dtype, to_channels_last_as)(shape, from, to, to_first, begin, end);
}

void cbam_pool(const CbamForwardArgs& args, int64_t begin, int64_t end) {
  RACCGAN_OF_DTYPE(args.shape.dtype, pool_as)(args, begin, end);
}

void cbam_gate(const CbamForwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    add_chunks(args, n);
    find_gate(args, n);
  }
}

void cbam_gather(const CbamForwardArgs& args, int64_t begin, int64_t end) {
  RACCGAN_OF_DTYPE(args.shape.dtype, gather_as)(args, begin, end);
}

void cbam_convolve(const CbamForwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile(s, task);
    const float* const planes = args.saved.planes + tile.sample * 2 * s.h * s.w;
    copy_plane(s, tile, planes, scratch);
    copy_plane(s, tile, planes + s.h * s.w, scratch + tile.size);
    float* const scores = args.saved.scores + tile.in_plane(s);
    convolve(s, tile, 2, scratch, args.weights.spatial_weight, scores);
    args.moments[task] = moments_of(scores, (tile.last - tile.first) * s.w);
  }
}

void cbam_apply(const CbamForwardArgs& args, int64_t begin, int64_t end) {
  RACCGAN_OF_DTYPE(args.shape.dtype, apply_as)(args, begin, end);
}
}  // namespace raccgan::RACCGAN_TARGET
