// Moments of each channel over runs of pixels on a GPU, and their gradient: one read of x each, no atomics.
//
// Compiled for the architectures in setup.py and run on the PTX machine of tests/ptx, but not yet on a GPU: no speed is
// claimed for it.
//
// What is summed is the distance from a pivot near the mean: a variance from sums of squares would cancel where the
// mean is large. Two launches: float32 within a piece of a run, float64 over its pieces, in a fixed order.
#include "moments.h"

#include "columns.h"

namespace raccgan {
namespace cuda {
namespace {

constexpr int64_t kLeastPiece = 256, kMostPieces = 512;

int64_t piece_of(const Runs& of) {
  const int64_t piece = ceiling(of.pixels, kMostPieces);
  return piece < kLeastPiece ? kLeastPiece : piece;
}

// ---- first launch ------------------------------------------------------------------------------------------------

// What the ReLU before the moments lets through is not below it.
__device__ float floor_of(const Runs& of) { return of.rectify ? 0.0f : -INFINITY; }

// The average of a few pixels of the run, the same in every block.
template <class T, int V>
__device__ void find_pivot(const Runs& of, const Tiling& t, const Columns<V>& at, float (&pivot)[V]) {
  constexpr int kPixels = 4;
  const auto* const x = static_cast<const typename T::Stored*>(of.x);
#pragma unroll
  for (int i = 0; i < V; ++i) pivot[i] = 0.0f;
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    float v[V];
    load<T, V>(x + at.at(t, p * t.pixels / kPixels), v);
#pragma unroll
    for (int i = 0; i < V; ++i) pivot[i] += larger(v[i], floor_of(of)) / kPixels;
  }
}

// partial [runs, pieces, 2, C] and pivots [runs, C].
template <class T, int V>
__global__ void __launch_bounds__(kThreads) sum_moments(Runs of, Tiling t, float* partial, float* pivots) {
  const Columns<V> at(t);
  const auto* const x = static_cast<const typename T::Stored*>(of.x);
  float pivot[V], sums[V] = {}, squares[V] = {};
  if (at.active) find_pivot<T, V>(of, t, at, pivot);
#pragma unroll 4
  for (int64_t p = at.first, from = at.at(t, p); p < at.last; p += at.rows, from += at.step) {
    float v[V];
    load<T, V>(x + from, v);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = larger(v[i], floor_of(of)) - pivot[i];
      sums[i] += d;
      squares[i] += d * d;
    }
  }
  if (at.piece == 0 && at.row == 0 && at.active) store_row(pivots + at.in_row(t), pivot);
  const float sum = add_rows(at, sums), sum_of_squares = add_rows(at, squares);
  if (!at.owns(t)) return;
  float* const to = partial + (at.run * t.pieces + at.piece) * 2 * t.channels + at.column();
  to[0] = sum;
  to[t.channels] = sum_of_squares;
}

// ---- second launch -----------------------------------------------------------------------------------------------

// A block takes a warp of channels of a run; its warps take the pieces in turn.
__global__ void __launch_bounds__(kThreads) finish_moments(Tiling t, const float* partial, const float* pivots,
                                                           float* mean, float* var) {
  __shared__ double shared[kThreads];
  const int64_t groups = ceiling(t.channels, kWarp), run = blockIdx.x / groups;
  const int64_t channel = blockIdx.x % groups * kWarp + threadIdx.x % kWarp;
  double sum = 0.0, squares = 0.0;
  if (channel < t.channels) {
    for (int64_t piece = threadIdx.x / kWarp; piece < t.pieces; piece += kWarps) {
      const float* const from = partial + (run * t.pieces + piece) * 2 * t.channels + channel;
      sum += from[0];
      squares += from[t.channels];
    }
  }
  sum = add_warps(sum, shared, kWarps);
  squares = add_warps(squares, shared, kWarps);
  if (threadIdx.x >= kWarp || channel >= t.channels) return;
  const double pixels = static_cast<double>(t.pixels), distance = sum / pixels;
  const double spread = squares / pixels - distance * distance;
  mean[run * t.channels + channel] = static_cast<float>(pivots[run * t.channels + channel] + distance);
  var[run * t.channels + channel] = static_cast<float>(spread < 0.0 ? 0.0 : spread);  // NaN stays NaN
}

// ---- gradient ----------------------------------------------------------------------------------------------------

// grad = (grad_mean + 2 grad_var (x - mean)) / pixels
template <class T, int V>
__global__ void __launch_bounds__(kThreads) spread_moments(Runs of, Tiling t, const float* grad_mean,
                                                           const float* grad_var, const float* mean, void* grad) {
  const Columns<V> at(t);
  const auto* const x = static_cast<const typename T::Stored*>(of.x);
  auto* const to = static_cast<typename T::Stored*>(grad);
  float slope[V] = {}, constant[V] = {}, centre[V] = {};
  if (at.active) {
    load_row(grad_var + at.in_row(t), slope);
    load_row(grad_mean + at.in_row(t), constant);
    load_row(mean + at.in_row(t), centre);
  }
  const float over = 1.0f / static_cast<float>(t.pixels);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    slope[i] *= 2.0f * over;
    constant[i] *= over;
  }
#pragma unroll 4
  for (int64_t p = at.first, from = at.at(t, p); p < at.last; p += at.rows, from += at.step) {
    float v[V];
    load<T, V>(x + from, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = (v[i] - centre[i]) * slope[i] + constant[i];
    store<T, V>(to + from, v);
  }
}

}  // namespace

// ---- host --------------------------------------------------------------------------------------------------------

int64_t moments_floats(const Runs& of) {
  return of.runs * (2 * ceiling(of.pixels, piece_of(of)) + 1) * of.channels;
}

const char* moments(const Runs& of, float* scratch, float* mean, float* var, int device, void* stream) {
  Queue queue(device, stream);
  float* const partial = scratch + of.runs * of.channels;
  for_vectors(of.dtype, of.channels, [&](auto element, auto vector) {
    constexpr int V = decltype(vector)::width;
    const Tiling t(of.runs, of.pixels, of.channels, piece_of(of), V);
    queue(sum_moments<decltype(element), V>, t.blocks(), kThreads, of, t, partial, scratch);
    queue(finish_moments, of.runs * ceiling(of.channels, kWarp), kThreads, t, partial, scratch, mean, var);
  }, of.x);
  return queue.error();
}

const char* moments_backward(const Runs& of, const float* grad_mean, const float* grad_var, const float* mean,
                             void* grad, int device, void* stream) {
  Queue queue(device, stream);
  for_vectors(of.dtype, of.channels, [&](auto element, auto vector) {
    constexpr int V = decltype(vector)::width;
    const Tiling t(of.runs, of.pixels, of.channels, piece_of(of), V);
    queue(spread_moments<decltype(element), V>, t.blocks(), kThreads, of, t, grad_mean, grad_var, mean, grad);
  }, of.x, grad);
  return queue.error();
}

}  // namespace cuda
}  // namespace raccgan
