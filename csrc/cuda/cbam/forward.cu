// CBAM on a GPU, forward, in the notation of cpu/cbam/forward.cpp.
//
// Three sweeps over x, a group of samples at a time, so that the second and the third find it in the second-level
// cache; where the norm couples all samples, the third goes over them anew. Sums over tiles are finished in float64
// and in a fixed order by the launch that needs them.
#include "pixels.h"

namespace raccgan::cuda {
namespace {
// partial [N, tiles, 2, C]: sum and max over the pixels of a tile.
template <class T, int V> __global__ void __launch_bounds__(kThreads) pool(Tiling t, const void* x, float* partial) {
  const Columns<V> at{t};
  float sums[V] = {}, maxima[V];
  for (int i = 0; i < V; ++i) maxima[i] = -INFINITY;
#pragma unroll 2
  for (int64_t p = at.first, from = at.at(p); p < at.last; p += at.rows, from += at.step) {
    float v[V];
    load<T, V>(x, from, v);
    for (int i = 0; i < V; ++i) {
      sums[i] += v[i];
      maxima[i] = fmaxf(maxima[i], v[i]);
    }
  }
  const float maximum = over_rows<float>(at, maxima, [](float a, float b) { return fmaxf(a, b); });
  at.write(add_rows(at, sums), maximum, partial);
}

// A block has a sample.
__global__ void __launch_bounds__(kThreads)
    find_gate(CbamForwardArgs args, Range range, int64_t tiles, const float* partial) {
  const CbamShape& s = args.shape;
  const CbamWeights& w = args.weights;
  const int64_t n = range.first + blockIdx.x;
  for (int64_t c = threadIdx.x; c < s.c; c += kThreads) {
    double sum = 0.0;
    float maximum = -INFINITY;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* const from = partial + (n * tiles + tile) * 2 * s.c + c;
      sum += from[0];
      maximum = fmaxf(maximum, from[s.c]);
    }
    args.saved.average[n * s.c + c] = static_cast<float>(sum / static_cast<double>(s.h * s.w));
    args.saved.maximum[n * s.c + c] = maximum;
  }
  __syncthreads();
  float* const hidden = args.saved.hidden + n * 3 * s.r;
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = threadIdx.x / kWarp; row < 2 * s.r; row += kWarps) {
    const float* const pooled = (row < s.r ? args.saved.average : args.saved.maximum) + n * s.c;
    const float* const weights = w.reduce_weight + row % s.r * s.c;
    float sum = 0.0f;
    for (int64_t c = lane; c < s.c; c += kWarp) sum = fmaf(weights[c], pooled[c], sum);
    sum = sum_over_group(sum, kWarp);
    if (lane == 0) hidden[row] = relu(sum + w.reduce_bias[row % s.r]);
  }
  __syncthreads();
  float* const both = hidden + 2 * s.r;
  for (int64_t r = threadIdx.x; r < s.r; r += kThreads) both[r] = hidden[r] + hidden[s.r + r];
  __syncthreads();
  for (int64_t c = threadIdx.x; c < s.c; c += kThreads) {
    float sum = 2.0f * w.expand_bias[c];
    for (int64_t r = 0; r < s.r; ++r) sum = fmaf(w.expand_weight[c * s.r + r], both[r], sum);
    args.saved.gate[n * s.c + c] = sigmoid(sum);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) gather(CbamForwardArgs args, Range range, int group) {
  const CbamShape& s = args.shape;
  const SharedPixel at{s, range, group};
  const float* const gate = args.saved.gate + at.n * s.c;
  float sum = 0.0f, maximum = -INFINITY;
#pragma unroll 2
  for (int64_t c = at.member * V; c < s.c; c += group * V) {
    float v[V], g[V];
    load<T, V>(args.x, at.at * s.c + c, v);
    load_floats(gate + c, g);
    for (int i = 0; i < V; ++i) {
      const float u = v[i] * g[i];
      sum += u;
      maximum = fmaxf(maximum, u);
    }
  }
  sum = sum_over_group(sum, group);
  maximum = max_over_group(maximum, group);
  if (at.member != 0 || !at.there) return;
  args.saved.planes[at.in_plane(0)] = maximum;
  args.saved.planes[at.in_plane(1)] = sum / static_cast<float>(s.c);
}

// Scores of a tile of a sample, and their mean and sum of squared deviations, partial [N, tiles, 2].
template <int kSize>
__global__ void __launch_bounds__(kThreads) find_scores(CbamForwardArgs args, Range range, double* partial) {
  const CbamShape& s = args.shape;
  const float* const weights = plane_weights<kSize>(args.weights.spatial_weight);
  const int64_t pixels = s.h * s.w;
  const unsigned tiles = static_cast<unsigned>(ceiling(pixels, kTilePixels));
  const int64_t n = range.first + blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t pixel = tile * kTilePixels + threadIdx.x;
  const bool there = pixel < pixels;
  static_assert(kTilePixels == kThreads);
  float score = 0.0f;
  if (there) {
    for (int plane = 0; plane < 2; ++plane) {
      const float* const values = args.saved.planes + (2 * n + plane) * pixels;
      score += convolve_at<kSize, false>(s, values, weights + plane * s.k * s.k, pixel);
    }
    args.saved.scores[n * pixels + pixel] = score;
  }
  const double mean = add_block(score) / static_cast<double>(least(pixels - tile * kTilePixels, kTilePixels));
  const double deviation = there ? score - mean : 0.0;
  const double squares = add_block(deviation * deviation);
  if (threadIdx.x != 0) return;
  partial[2 * (n * tiles + tile)] = mean;
  partial[2 * (n * tiles + tile) + 1] = squares;
}

// saved.moments and the outputs of the samples that share them, a block each: from their tiles, or as given.
__global__ void __launch_bounds__(kThreads)
    join_moments(CbamForwardArgs args, Range range, int64_t samples, const double* partial) {
  const CbamShape& s = args.shape;
  const int64_t pixels = s.h * s.w, tiles = ceiling(pixels, kTilePixels), which = range.first + blockIdx.x;
  if (args.norm == CbamNorm::kFixed) {
    if (threadIdx.x == 0) args.saved.moments[0] = *args.given_mean, args.saved.moments[1] = *args.given_var;
    return;
  }
  const double* const from = partial + which * tiles * 2;
  const auto size = [&](int64_t i) {
    return static_cast<double>(least(pixels - i % tiles * kTilePixels, kTilePixels));
  };
  double sum = 0.0, squares = 0.0;
  for (int64_t i = threadIdx.x; i < samples * tiles; i += kThreads) sum += size(i) * from[2 * i];
  const double count = static_cast<double>(samples * pixels), mean = add_block(sum) / count;
  for (int64_t i = threadIdx.x; i < samples * tiles; i += kThreads) {
    const double away = from[2 * i] - mean;
    squares += from[2 * i + 1] + size(i) * away * away;
  }
  const double var = add_block(squares) / count;
  if (threadIdx.x != 0) return;
  args.saved.moments[2 * which] = args.mean[which] = static_cast<float>(mean);
  args.saved.moments[2 * which + 1] = args.var[which] = static_cast<float>(var);
}

template <class T, int V> __global__ void __launch_bounds__(kThreads) apply(CbamForwardArgs args, Tiling t) {
  const Columns<V> at{t};
  if (!at.active) return;
  const CbamSpatialGate spatial = spatial_gate(args, at.group);
  const float* const scores = args.saved.scores + at.group * t.pixels;
  float gate[V];
  load_floats(args.saved.gate + at.in_row(), gate);
#pragma unroll 2
  for (int64_t p = at.first, i = at.at(p); p < at.last; p += at.rows, i += at.step) {
    float v[V];
    load<T, V>(args.x, i, v);
    const float open = gated(spatial, scores[p]);
    for (int j = 0; j < V; ++j) v[j] *= gate[j] * open;
    store<T, V>(args.y, i, v);
  }
}
}  // namespace

int64_t scratch_floats(const CbamForwardArgs& args) {
  return args.shape.n * ceiling(pixels(args.shape), kTilePixels) * (4 + 2 * args.shape.c);
}

const char* queue_pass(const CbamForwardArgs& args, float* scratch, int device, void* stream) {
  const CbamShape& s = args.shape;
  const int64_t tiles = ceiling(pixels(s), kTilePixels);
  double* const partial = reinterpret_cast<double*>(scratch);
  float* const pooled = scratch + s.n * tiles * 4;
  const bool fixed = args.norm == CbamNorm::kFixed, coupled = args.norm == CbamNorm::kBatch;
  Queue queue(device, stream);
  queue.take(too_large(s));
  for_vectors(s.dtype, s.c, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int V = vector;
    const int group = threads_a_pixel(s.c, V);
    const auto apply_to = [&](const Range& range) {
      const Tiling t = tiling_of(s, range, V);
      queue(apply<T, V>, t.blocks(), kThreads, args, t);
    };
    for_groups(s, 1, [&](const Range& range) {
      const Tiling t = tiling_of(s, range, V);
      queue(pool<T, V>, t.blocks(), kThreads, t, args.x, pooled);
      queue(find_gate, range.count, kThreads, args, range, tiles, pooled);
      queue(gather<T, V>, blocks_of_pixels(s, range, group), kThreads, args, range, group);
      for_plane_size(s.k,
                     [&](auto size) { queue(find_scores<size>, range.count * tiles, kThreads, args, range, partial); });
      if (coupled) return;
      queue(join_moments, fixed ? 1 : range.count, kThreads, args, range, 1, partial);
      apply_to(range);
    });
    if (!coupled) return;
    queue(join_moments, 1, kThreads, args, Range{0, 1}, s.n, partial);
    for_groups(s, 1, apply_to);
  }, args.x, args.y, args.saved.gate);
  return queue.error;
}
}  // namespace raccgan::cuda
