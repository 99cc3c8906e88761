// How a block goes over pixels of channels [runs, pixels, C]: neighbouring threads share a pixel, a few neighbouring
// channels each, and keep their channels while they go down the pixels of a piece of a run.
#pragma once

#include "elements.h"

namespace raccgan::cuda {
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

// A thread's part: the pixels first, first + rows, ... < last of a run, and V channels of them from `channel` on.
template <int V>
struct Columns {
  int64_t run, piece, first, last, channel;
  int64_t step;  // elements from one of its pixels to the next
  int row, rows, lanes;
  bool active;  // other threads take part in barriers alone

  __device__ explicit Columns(const Tiling& t) {
    // A division of 64 bits is some hundred instructions; a grid's sizes have 32.
    const unsigned chunks = static_cast<unsigned>(t.chunks), pieces = static_cast<unsigned>(t.pieces);
    const unsigned chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
    run = t.start + rest / pieces;
    piece = rest % pieces;
    lanes = t.lanes;
    rows = kThreads / lanes;
    row = threadIdx.x / lanes;
    channel = static_cast<int64_t>(chunk * lanes + threadIdx.x % lanes) * V;
    active = row < rows && channel < t.channels;
    first = piece * t.piece + row;
    last = !active ? 0 : (piece + 1) * t.piece < t.pixels ? (piece + 1) * t.piece : t.pixels;
    step = rows * t.channels;
  }

  // The channel whose sum over all rows ends up with this thread, if it owns one.
  __device__ int64_t column() const { return channel - threadIdx.x % lanes * V + threadIdx.x; }
  __device__ bool owns(const Tiling& t) const {
    return static_cast<int>(threadIdx.x) < lanes * V && column() < t.channels;
  }

  // In [runs, C], and at a pixel in [runs, pixels, C].
  __device__ int64_t in_row(const Tiling& t) const { return run * t.channels + channel; }
  __device__ int64_t at(const Tiling& t, int64_t pixel) const {
    return (run * t.pixels + pixel) * t.channels + channel;
  }
};

// The threads' values of V channels each, combined over the rows of a block in a fixed order: a thread gets the result
// of its column, if it owns one. Every thread of the block calls it.
template <class Wide, int V, class Combine>
__device__ float over_rows(const Columns<V>& at, const float (&values)[V], const Combine& combine) {
  alignas(16) __shared__ float shared[kThreads * V];
  __syncthreads();
  store_floats(shared + threadIdx.x * V, values);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= at.lanes * V) return 0.0f;
  const float* const from = shared + threadIdx.x;
  Wide result = *from;
#pragma unroll 4
  for (int row = 1; row < at.rows; ++row) result = combine(result, from[row * at.lanes * V]);
  return static_cast<float>(result);
}

template <int V>
__device__ float add_rows(const Columns<V>& at, const float (&values)[V]) {
  return over_rows<double>(at, values, [](double a, float b) { return a + b; });
}

template <int V>
__device__ float max_rows(const Columns<V>& at, const float (&values)[V]) {
  return over_rows<float>(at, values, [](float a, float b) { return fmaxf(a, b); });
}

// The sum of v over a block's threads, in a fixed order, the same for all of them. `shared` has room for one
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

// The sum of a lane's v over a block's warps, in a fixed order, valid in the first warp. `shared` has room for one
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
inline __device__ float relu(float v) { return larger(v, 0.0f); }

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

  // The result of a launcher of another file.
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
}  // namespace raccgan::cuda
