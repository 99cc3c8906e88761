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

// The sum and the max over a chunk's pixels, to [2, C].
template <class T> void pool(const CbamShape& s, const Samples& samples, const Chunk& chunk, float* sums) {
  const auto* const x = chunk.of<T>(s, samples);
  float* const maxima = sums + s.c;
  const int64_t whole = s.c / kWidth, rest = whole * kWidth;
  for (int64_t v = 0; v < whole; v += kPooled) {
    const int64_t at = v * kWidth;
    pool_whole<T>(least(kPooled, whole - v), x + at, s.c, chunk.count(), sums + at, maxima + at);
  }
  if (rest < s.c) pool_vectors<T, 1>(Rest{s.c - rest}, x + rest, s.c, chunk.count(), sums + rest, maxima + rest);
}

// The average and the max of a sample from those of its chunks, [chunks, 2, C].
void add_chunks(const CbamArgs& args, int64_t n, const float* pooled) {
  const CbamShape& s = args.shape;
  const double over = 1 / static_cast<double>(pixels(s));
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

void find_gate(const CbamArgs& args, int64_t n) {
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

template <class T> void gather(const CbamArgs& args, const Samples& samples, const Chunk& chunk) {
  const CbamShape& s = args.shape;
  const float over = 1.0f / static_cast<float>(s.c);
  const auto* const x = chunk.of<T>(s, samples);
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
    pixel_lanes.store(plane + pixels(s) + block, sums_of(sums) * over);
  });
}

// Mean and sum of squared deviations of a tile of scores.
struct Moments {
  double mean, squares;
};

Moments moments_of(const float* v, int64_t count) {
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

Moments find_scores(const CbamArgs& args, const Tile& tile) {
  const CbamShape& s = args.shape;
  const Memory<> scratch(tile_floats(s));
  copy_planes(s, tile, args.saved.planes + tile.sample * 2 * pixels(s), scratch);
  float* const scores = args.saved.scores + tile.in_plane(s);
  convolve(s, tile, 2, scratch, args.weights.spatial_weight, scores);
  return moments_of(scores, tile.count(s));
}

// saved.moments from the tiles of the samples first <= n < last, which share them.
void join_moments(const CbamArgs& args, const Moments* by_tile, int64_t first, int64_t last) {
  const CbamShape& s = args.shape;
  double sum = 0, squares = 0;
  const auto pixels = [&](int64_t tile) { return static_cast<double>(Tile(s, tile).count(s)); };
  for (int64_t i = first * tiles(s); i < last * tiles(s); ++i) sum += pixels(i) * by_tile[i].mean;
  const double count = static_cast<double>((last - first) * s.h * s.w), mean = sum / count;
  for (int64_t i = first * tiles(s); i < last * tiles(s); ++i) {
    const double away = by_tile[i].mean - mean;
    squares += by_tile[i].squares + pixels(i) * away * away;
  }
  float* const to = args.saved.moments + 2 * first;
  to[0] = static_cast<float>(mean);
  to[1] = static_cast<float>(squares / count);
}

template <class T> void apply(const CbamForwardArgs& args, const Samples& samples, const Chunk& chunk) {
  const CbamShape& s = args.shape;
  const auto* const x = chunk.of<T>(s, samples);
  auto* const y = static_cast<typename T::Stored*>(args.y) + chunk.in_tensor(s);
  const float* const gate = args.saved.gate + chunk.sample * s.c;
  float spatial[kMostPixels];
  find_gates(args, chunk, spatial);
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

template <class T> void forward(const CbamForwardArgs& args) {
  const CbamShape& s = args.shape;
  const bool coupled = args.norm == CbamNorm::kBatch, fixed = args.norm == CbamNorm::kFixed;
  const Memory<> pooled(s.n * chunks(s) * 2 * s.c);
  const Memory<Moments> by_tile(s.n * tiles(s));
  float* const found = args.saved.moments;
  if (fixed) found[0] = *args.given_mean, found[1] = *args.given_var;
  const Image images[] = {{args.x, args.x_planar}};
  const auto apply_all = [&](const Samples* x, int64_t first, int64_t last) {
    for_tasks<Chunk>(s, first, last, [&](const Chunk& chunk) { apply<T>(args, *x, chunk); });
  };
  for_groups<T>(s, images, [&](const Samples* x, int64_t first, int64_t last) {
    for_tasks<Chunk>(s, first, last, [&](const Chunk& chunk) { pool<T>(s, *x, chunk, pooled + chunk.task * 2 * s.c); });
    for_samples(s, first, last, [&](int64_t n) {
      add_chunks(args, n, pooled + n * chunks(s) * 2 * s.c);
      find_gate(args, n);
    });
    // From the end: the first sweep has left its last chunks in the nearest cache.
    for_tasks<Chunk>(s, first, last, [&](const Chunk& chunk) { gather<T>(args, *x, chunk); }, true);
    for_tasks<Tile>(s, first, last, [&](const Tile& tile) { by_tile[tile.task] = find_scores(args, tile); });
    if (coupled) return;
    for (int64_t n = first; n < last && !fixed; ++n) join_moments(args, by_tile, n, n + 1);
    apply_all(x, first, last);
  });
  if (coupled) {
    join_moments(args, by_tile, 0, s.n);
    for_groups<T>(s, images, apply_all);
  }
  for (int64_t i = 0; i < moments(s, args.norm) && !fixed; ++i) {
    args.mean[i] = found[2 * i];
    args.var[i] = found[2 * i + 1];
  }
}
}  // namespace

void cbam_forward(const CbamForwardArgs& args) { RACCGAN_OF_DTYPE(args.shape.dtype, forward)(args); }
}  // namespace raccgan::RACCGAN_TARGET
