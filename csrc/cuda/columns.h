// How a block goes over pixels of channels [runs, pixels, C]: neighbouring threads share a pixel, a few neighbouring
// channels each, and keep their channels while they go down the pixels of a piece of a run.
#pragma once

#include "elements.h"

namespace raccgan {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

__host__ __device__ constexpr int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tiling {
  int64_t runs, pixels, channels;
  int64_t start = 0;  // the first run, where a launch has some of them only
  int64_t piece;   // pixels a block, fixed by the shape alone, so that a sum over pieces is always the same sum
  int64_t pieces;  // a run
  int lanes;       // threads that share a pixel
  int64_t chunks;  // of `lanes` threads, in a pixel

  // V: channels a thread.
  Tiling(int64_t runs, int64_t pixels, int64_t channels, int64_t piece, int V)
      : runs(runs),
        pixels(pixels),
        channels(channels),
        piece(piece),
        pieces(ceiling(pixels, piece)),
        lanes(static_cast<int>(channels / V < kWarp ? channels / V : kWarp)),
        chunks(ceiling(channels / V, lanes)) {}

  int64_t blocks() const { return runs * pieces * chunks; }
};

// A thread's share: the pixels first, first + rows, ... < last of a run, and V channels of them from `channel` on.
template <int V>
struct Columns {
  int64_t run, piece, first, last, channel;
  int64_t step;  // elements from one of its pixels to the next
  int row, rows, lanes;
  bool active;  // threads that are not share in barriers alone

  __device__ explicit Columns(const Tiling& t) {
    const int64_t chunk = blockIdx.x % t.chunks, rest = blockIdx.x / t.chunks;
    run = t.start + rest / t.pieces;
    piece = rest % t.pieces;
    lanes = t.lanes;
    rows = kThreads / lanes;
    row = threadIdx.x / lanes;
    channel = (chunk * lanes + threadIdx.x % lanes) * V;
    active = row < rows && channel < t.channels;
    first = piece * t.piece + row;
    last = !active ? 0 : (piece + 1) * t.piece < t.pixels ? (piece + 1) * t.piece : t.pixels;
    step = rows * t.channels;
  }

  // In [runs, C], and at a pixel in [runs, pixels, C].
  __device__ int64_t in_row(const Tiling& t) const { return run * t.channels + channel; }
  __device__ int64_t at(const Tiling& t, int64_t pixel) const { return (run * t.pixels + pixel) * t.channels + channel; }
};

// Sums over the rows of a block, in float64 and in a fixed order, valid in row 0. Every thread of the block calls it.
template <int V>
__device__ void add_rows(const Columns<V>& at, float (&sums)[V]) {
  __shared__ float shared[kThreads * V];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; ++i) shared[i * kThreads + threadIdx.x] = sums[i];
  __syncthreads();
  if (at.row != 0) return;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    double sum = sums[i];
    for (int row = 1; row < at.rows; ++row) sum += shared[i * kThreads + row * at.lanes + threadIdx.x];
    sums[i] = static_cast<float>(sum);
  }
}

// The largest of the rows of a block, likewise.
template <int V>
__device__ void max_rows(const Columns<V>& at, float (&maxima)[V]) {
  __shared__ float shared[kThreads * V];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; ++i) shared[i * kThreads + threadIdx.x] = maxima[i];
  __syncthreads();
  if (at.row != 0) return;
  for (int row = 1; row < at.rows; ++row) {
#pragma unroll
    for (int i = 0; i < V; ++i) maxima[i] = fmaxf(maxima[i], shared[i * kThreads + row * at.lanes + threadIdx.x]);
  }
}

// The sum over a block of what its threads have, in a fixed order, the same for all of them. `shared` has room for one
// number a thread. Every thread of the block calls it.
inline __device__ double add_block(double v, double* shared) {
  __syncthreads();
  shared[threadIdx.x] = v;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  return shared[0];
}

// The sum over a block's warps of what a lane has, in a fixed order, valid in the first warp. `shared` has room for one
// number a thread. Every thread of the block calls it.
inline __device__ double add_warps(double v, double* shared, int warps) {
  __syncthreads();
  shared[threadIdx.x] = v;
  __syncthreads();
  if (threadIdx.x >= kWarp) return v;
  for (int i = 1; i < warps; ++i) v += shared[i * kWarp + threadIdx.x];
  return v;
}

template <int V>
__device__ void load_row(const float* from, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = from[i];
}

template <int V>
__device__ void store_row(float* to, const float (&from)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = from[i];
}

// PyTorch's ReLU: NaN stays NaN.
inline __device__ float relu(float v) { return v < 0.0f ? 0.0f : v; }

// ---- host --------------------------------------------------------------------------------------------------------

// Queues a kernel, unless there is nothing to do or an earlier launch of the call failed.
class Queue {
 public:
  Queue(int device, void* stream) : stream_(static_cast<cudaStream_t>(stream)) {
    // This library's CUDA runtime is linked statically, and has its own idea of the current device.
    fail(cudaSetDevice(device));
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) {
    with_shared(0, kernel, blocks, threads, arguments...);
  }

  // The same with so many bytes of launched_shared().
  template <class... Parameters, class... Arguments>
  void with_shared(int bytes, void (*kernel)(Parameters...), int64_t blocks, int threads,
                   const Arguments&... arguments) {
    if (blocks > INT32_MAX) error_ = "more blocks than a grid holds";
    if (blocks == 0 || error_) return;
    fail(launch(kernel, blocks, threads, bytes, stream_, arguments...));
  }

  // What a launcher of another file has said.
  void take(const char* error) {
    if (!error_) error_ = error;
  }

  const char* error() const { return error_; }  // null, or CUDA's message

 private:
  void fail(cudaError_t error) {
    if (error != cudaSuccess) error_ = cudaGetErrorString(error);
  }

  cudaStream_t stream_;
  const char* error_ = nullptr;
};

}  // namespace
}  // namespace cuda
}  // namespace raccgan
