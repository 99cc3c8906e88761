// Moments of each channel over groups of pixels on a GPU, and their gradient: one read of x each, no atomics.
//
// Sums are of the distance from a center near the mean: a variance from sums of squares would cancel where the mean is
// large. Two launches: float32 within a block's pixels, float64 over the blocks, in a fixed order.
#include "common/columns.h"
#include "passes.h"

namespace raccgan::cuda {
namespace {
constexpr int64_t kLeastPixels = 256, kMostBlocks = 512;

int64_t pixels_a_block(const MomentsArgs& args) {
  const int64_t pixels = ceiling(args.pixels, kMostBlocks);
  return pixels < kLeastPixels ? kLeastPixels : pixels;
}

// The least value that the ReLU before the moments passes.
__device__ float floor_of(const MomentsArgs& args) { return args.relu ? 0.0f : -INFINITY; }

// The average of a few pixels of the group, the same in every block.
template <class T, int V>
__device__ void find_center(const MomentsArgs& args, const Columns<V>& at, float (&center)[V]) {
  constexpr int kPixels = 4;
  for (int i = 0; i < V; ++i) center[i] = 0.0f;
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    float v[V];
    load<T, V>(args.x, at.at(p * args.pixels / kPixels), v);
    for (int i = 0; i < V; ++i) center[i] += larger(v[i], floor_of(args)) / kPixels;
  }
}

// partial [groups, blocks, 2, C] and centers [groups, C].
template <class T, int V>
__global__ void __launch_bounds__(kThreads) sum_moments(MomentsArgs args, Tiling t, float* partial, float* centers) {
  const Columns<V> at{t};
  float center[V], sums[V] = {}, squares[V] = {};
  if (at.active) find_center<T, V>(args, at, center);
#pragma unroll 4
  for (int64_t p = at.first, from = at.at(p); p < at.last; p += at.rows, from += at.step) {
    float v[V];
    load<T, V>(args.x, from, v);
    for (int i = 0; i < V; ++i) {
      const float d = larger(v[i], floor_of(args)) - center[i];
      sums[i] += d;
      squares[i] += d * d;
    }
  }
  if (at.tile == 0 && at.row == 0 && at.active) store_floats(centers + at.in_row(), center);
  at.write(add_rows(at, sums), add_rows(at, squares), partial);
}

// A block takes a warp of channels of a group; its warps take turns with the first launch's blocks.
__global__ void __launch_bounds__(kThreads)
    finish_moments(Tiling t, const float* partial, const float* centers, float* mean, float* var) {
  __shared__ double shared[kThreads];
  const int64_t groups = ceiling(t.channels, kWarp), group = blockIdx.x / groups;
  const int64_t channel = blockIdx.x % groups * kWarp + threadIdx.x % kWarp;
  double sum = 0.0, squares = 0.0;
  if (channel < t.channels) {
    for (int64_t tile = threadIdx.x / kWarp; tile < t.tiles; tile += kWarps) {
      const float* const from = partial + (group * t.tiles + tile) * 2 * t.channels + channel;
      sum += from[0];
      squares += from[t.channels];
    }
  }
  sum = add_warps(sum, shared, kWarps);
  squares = add_warps(squares, shared, kWarps);
  if (threadIdx.x >= kWarp || channel >= t.channels) return;
  const double pixels = static_cast<double>(t.pixels), distance = sum / pixels;
  const double spread = squares / pixels - distance * distance;
  mean[group * t.channels + channel] = static_cast<float>(centers[group * t.channels + channel] + distance);
  var[group * t.channels + channel] = static_cast<float>(spread < 0.0 ? 0.0 : spread);  // NaN stays NaN
}

// grad = (grad_mean + 2 grad_var (x - mean)) / pixels
template <class T, int V>
__global__ void __launch_bounds__(kThreads) spread_moments(MomentsArgs args, Tiling t, const float* grad_mean,
                                                           const float* grad_var, const float* mean, void* grad) {
  const Columns<V> at{t};
  float slope[V] = {}, constant[V] = {}, center[V] = {};
  if (at.active) {
    load_floats(grad_var + at.in_row(), slope);
    load_floats(grad_mean + at.in_row(), constant);
    load_floats(mean + at.in_row(), center);
  }
  const float over = 1.0f / static_cast<float>(t.pixels);
  for (int i = 0; i < V; ++i) {
    slope[i] *= 2.0f * over;
    constant[i] *= over;
  }
#pragma unroll 4
  for (int64_t p = at.first, from = at.at(p); p < at.last; p += at.rows, from += at.step) {
    float v[V];
    load<T, V>(args.x, from, v);
    for (int i = 0; i < V; ++i) v[i] = (v[i] - center[i]) * slope[i] + constant[i];
    store<T, V>(grad, from, v);
  }
}
}  // namespace

int64_t moments_floats(const MomentsArgs& args) {
  return args.groups * (2 * ceiling(args.pixels, pixels_a_block(args)) + 1) * args.channels;
}

const char* moments(const MomentsArgs& args, float* scratch, float* mean, float* var, int device, void* stream) {
  Queue queue(device, stream);
  float* const partial = scratch + args.groups * args.channels;
  for_vectors(args.dtype, args.channels, [&](auto element, auto vector) {
    constexpr int V = vector;
    const Tiling t{args.groups, args.pixels, args.channels, pixels_a_block(args), V};
    queue(sum_moments<decltype(element), V>, t.blocks(), kThreads, args, t, partial, scratch);
    queue(finish_moments, args.groups * ceiling(args.channels, kWarp), kThreads, t, partial, scratch, mean, var);
  }, args.x);
  return queue.error;
}

const char* moments_backward(const MomentsArgs& args, const float* grad_mean, const float* grad_var, const float* mean,
                             void* grad, int device, void* stream) {
  Queue queue(device, stream);
  for_vectors(args.dtype, args.channels, [&](auto element, auto vector) {
    constexpr int V = vector;
    const Tiling t{args.groups, args.pixels, args.channels, pixels_a_block(args), V};
    queue(spread_moments<decltype(element), V>, t.blocks(), kThreads, args, t, grad_mean, grad_var, mean, grad);
  }, args.x, grad, grad_mean, grad_var, mean);
  return queue.error;
}
}  // namespace raccgan::cuda
