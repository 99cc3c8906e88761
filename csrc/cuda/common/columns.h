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
  int64_t tile;  // pixels a block, fixed by the shape alone, so that a sum over tiles is always the same sum
  int vector;  // channels a thread
  int64_t start = 0;  // the first group, where a launch has some of them only
  int64_t tiles = ceiling(pixels, tile);  // a group
  int lanes = static_cast<int>(least(channels / vector, kWarp));  // threads that share a pixel
  int64_t chunks = ceiling(channels / vector, lanes);  // of `lanes` threads, in a pixel

  int64_t blocks() const { return groups * tiles * chunks; }
};

// A thread's part: the pixels first, first + rows, ... < last of a group, and V channels of them from `channel` on.
template <int V> struct Columns {
  const Tiling& t;
  // A division of 64 bits is some hundred instructions; a grid's sizes have 32.
  unsigned chunk = blockIdx.x % static_cast<unsigned>(t.chunks), rest = blockIdx.x / static_cast<unsigned>(t.chunks);
  int64_t group = t.start + rest / static_cast<unsigned>(t.tiles), tile = rest % static_cast<unsigned>(t.tiles);
  int lanes = t.lanes, rows = kThreads / lanes, row = threadIdx.x / lanes;
  int64_t channel = static_cast<int64_t>(chunk * lanes + threadIdx.x % lanes) * V;
  bool active = row < rows && channel < t.channels;  // other threads take part in barriers alone
  int64_t first = tile * t.tile + row, last = active ? least((tile + 1) * t.tile, t.pixels) : 0;
  int64_t step = rows * t.channels;  // elements from one of its pixels to the next

  // In [groups, C], and at a pixel in [groups, pixels, C].
  __device__ int64_t in_row() const { return group * t.channels + channel; }
  __device__ int64_t at(int64_t pixel) const { return (group * t.pixels + pixel) * t.channels + channel; }

  // Writes what over_rows gave the thread, if it did, to partial [groups, tiles, 2, C].
  __device__ void write(float first, float second, float* partial) const {
    const int64_t column = channel - threadIdx.x % lanes * V + threadIdx.x;
    if (static_cast<int>(threadIdx.x) >= lanes * V || column >= t.channels) return;
    float* const to = partial + (group * t.tiles + tile) * 2 * t.channels + column;
    to[0] = first;
    to[t.channels] = second;
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

// The threads' values of V channels each, combined over the rows of a block in a fixed order: each of the first threads
// gets the result of one channel. Every thread of the block calls it.
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

// The sum of v over a block's threads, in a fixed order, the same for all of them. Every thread of the block calls it.
inline __device__ double add_block(double v) {
  __shared__ double shared[kThreads];
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

// Scratch memory, part after part of `memory`; null only counts the floats.
struct Scratch {
  float* memory;
  int64_t floats = 0;

  // On a 16-byte boundary; null where it is not needed.
  float* take(int64_t count, bool needed = true) {
    const int64_t at = floats;
    floats += needed ? rounded_up(count, 4) : 0;
    return needed && memory ? memory + at : nullptr;
  }
};

// Queues kernels, unless there is nothing to do or an earlier launch of the call failed.
struct Queue {
  const int device;
  void* const stream;
  const char* error = nullptr;  // or what is wrong

  Queue(int device, void* stream) : device(device), stream(stream) {
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
    if (blocks > INT32_MAX) error = "more blocks than a grid holds";
    if (blocks == 0 || error) return;
    if (bytes > 0) fail(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (error) return;
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    fail(cudaGetLastError());
  }

  // Nothing more is queued after an error; null is none.
  void take(const char* message) {
    if (!error) error = message;
  }

  void fail(cudaError_t code) {
    if (code != cudaSuccess) error = cudaGetErrorString(code);
  }
};
}}  // namespace raccgan::cuda
