// How a block goes over pixels of channels [groups, pixels, C]: neighbouring threads share a pixel, a few neighbouring
// channels each, and keep their channels while they go down the pixels of a tile of a group.
#pragma once

#include "elements.h"

namespace raccgan::cuda { namespace {
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

__host__ __device__ constexpr int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tiling {
  int64_t groups, pixels, channels;
  int64_t start = 0;  // the first group, where a launch has some of them only
  int64_t tile;   // pixels a block, fixed by the shape alone, so that a sum over tiles is always the same sum
  int64_t tiles;   // a group
  int lanes;       // threads that share a pixel
  int64_t chunks;  // of `lanes` threads, in a pixel

  // V: channels a thread.
  Tiling(int64_t groups, int64_t pixels, int64_t channels, int64_t tile, int V)
      : groups(groups), pixels(pixels), channels(channels), tile(tile), tiles(ceiling(pixels, tile)),
        lanes(static_cast<int>(channels / V < kWarp ? channels / V : kWarp)), chunks(ceiling(channels / V, lanes)) {}

  int64_t blocks() const { return groups * tiles * chunks; }
};

// A thread's part: the pixels first, first + rows, ... < last of a group, and V channels of them from `channel` on.
template <int V> struct Columns {
  int64_t group, tile, first, last, channel;
  int64_t step;  // elements from one of its pixels to the next
  int row, rows, lanes;
  bool active;  // other threads take part in barriers alone

  __device__ explicit Columns(const Tiling& t) {
    // A division of 64 bits is some hundred instructions; a grid's sizes have 32.
    const unsigned chunks = static_cast<unsigned>(t.chunks), tiles = static_cast<unsigned>(t.tiles);
    const unsigned chunk = blockIdx.x % chunks, rest = blockIdx.x / chunks;
    group = t.start + rest / tiles;
    tile = rest % tiles;
    lanes = t.lanes;
    rows = kThreads / lanes;
    row = threadIdx.x / lanes;
    channel = static_cast<int64_t>(chunk * lanes + threadIdx.x % lanes) * V;
    active = row < rows && channel < t.channels;
    first = tile * t.tile + row;
    last = !active ? 0 : (tile + 1) * t.tile < t.pixels ? (tile + 1) * t.tile : t.pixels;
    step = rows * t.channels;
  }

  // The channel whose sum over all rows ends up with this thread, if it owns one.
  __device__ int64_t column() const { return channel - threadIdx.x % lanes * V + threadIdx.x; }
  __device__ bool owns(const Tiling& t) const {
    return static_cast<int>(threadIdx.x) < lanes * V && column() < t.channels;
  }

  // Writes what the thread has of its column, if it owns one, to partial [groups, tiles, 2, C].
  __device__ void write(const Tiling& t, float first, float second, float* partial) const {
    if (!owns(t)) return;
    float* const to = partial + (group * t.tiles + tile) * 2 * t.channels + column();
    to[0] = first;
    to[t.channels] = second;
  }

  // In [groups, C], and at a pixel in [groups, pixels, C].
  __device__ int64_t in_row(const Tiling& t) const { return group * t.channels + channel; }
  __device__ int64_t at(const Tiling& t, int64_t pixel) const {
    return (group * t.pixels + pixel) * t.channels + channel;
  }
};

constexpr unsigned kAllLanes = 0xffffffff;

// `group` neighbouring threads, a power of two up to a warp, share a pixel: about four loads each.
inline int threads_a_pixel(int64_t channels, int V) {
  int group = 1;
  while (group < kWarp && group * 4 < channels / V) group *= 2;
  return group;
}

template <class Number> __device__ Number sum_over_group(Number v, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

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

template <int V> __device__ float add_rows(const Columns<V>& at, const float (&values)[V]) {
  return over_rows<double>(at, values, [](double a, float b) { return a + b; });
}

template <int V> __device__ float max_rows(const Columns<V>& at, const float (&values)[V]) {
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

template <int V> __device__ void load_row(const float* from, float (&to)[V]) {
  for (int i = 0; i < V; ++i) to[i] = from[i];
}

template <int V> __device__ void store_row(float* to, const float (&from)[V]) {
  for (int i = 0; i < V; ++i) to[i] = from[i];
}

// PyTorch's ReLU: NaN stays NaN.
inline __device__ float relu(float v) { return larger(v, 0.0f); }

// Scratch memory, part after part of `memory`; null only counts the floats.
class Scratch {
 public:
  explicit Scratch(float* memory) : memory_(memory) {}

  // On a 16-byte boundary; null where it is not needed.
  float* take(bool needed, int64_t count) {
    const int64_t at = floats_;
    floats_ += needed ? ceiling(count, 4) * 4 : 0;
    return needed && memory_ ? memory_ + at : nullptr;
  }
  int64_t floats() const { return floats_; }

 private:
  float* memory_;
  int64_t floats_ = 0;
};

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
    if (bytes > 0) fail(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (error_) return;
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream_>>>(arguments...);
    fail(cudaGetLastError());
  }

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
}}  // namespace raccgan::cuda
