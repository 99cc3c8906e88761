// The anomaly score on a GPU: one read of each tensor, no atomics.
//
// Compiled for the architectures in setup.py and run on the PTX machine of tests/ptx, but not yet on a GPU: no speed is
// claimed for it.
//
// Two launches. In the first a block sums (a - b)^2 over one piece of a sample: float32 within a thread, float64
// across threads. The second adds a sample's pieces up in float64, in a fixed order. Which thread adds what depends
// on the sample's shape and dtype alone, not on alignment or batch, so a sample's score is always the same.
#include "anomaly_score.h"

#include "elements.h"

namespace raccgan {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// to[i] = from[i] in float32, and 0 from `left` on. kAligned: 16-byte loads, `from` aligned to them and left >= kCount.
template <class T, int kCount, bool kAligned>
__device__ void load(const typename T::Stored* from, int64_t left, float (&to)[kCount]) {
  if constexpr (kAligned) {
    widen<T>(fetch<T, kCount>(from), to);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < left ? T::widen(from[i]) : 0.0f;
  }
}

// sums[i] += (a[i] - b[i])^2 for i < left.
template <class T, int kCount, bool kAligned>
__device__ void add_squares(const typename T::Stored* a, const typename T::Stored* b, int64_t left,
                            float (&sums)[kCount]) {
  float wide_a[kCount], wide_b[kCount];
  load<T, kCount, kAligned>(a, left, wide_a);
  load<T, kCount, kAligned>(b, left, wide_b);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float d = wide_a[i] - wide_b[i];
    sums[i] += d * d;
  }
}

template <class T>
__device__ const typename T::Stored* sample_of(const void* data, int64_t n, int64_t stride) {
  return static_cast<const typename T::Stored*>(data) + n * stride;
}

template <int kCount>
__device__ float sum_of(const float (&values)[kCount]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += values[i];
  return sum;
}

__device__ double sum_over_warp(double value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Every thread of the block calls it; the sum is valid in thread 0.
__device__ double sum_over_block(double value) {
  __shared__ double warps[kThreads / kWarp];
  value = sum_over_warp(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += warps[i];
  return sum;
}

// The block's piece: sample n, elements or pixels first <= i < first + count.
struct Piece {
  int64_t n, first, count;

  __device__ Piece(int64_t size, int64_t piece) {
    const int64_t a_sample = pieces(size, piece);
    n = blockIdx.x / a_sample;
    first = blockIdx.x % a_sample * piece;
    count = size - first < piece ? size - first : piece;
  }
};

// ---- first launch ------------------------------------------------------------------------------------------------

// An image is [C, pixels]. A thread takes kVector neighbouring pixels at a time, through all channels.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) sum_planes(ImageArgs args) {
  constexpr int kCount = kVector<T>;
  const Piece piece(args.pixels, kImagePiece);
  const auto* const a = sample_of<T>(args.images.a, piece.n, args.images.stride_a) + piece.first;
  const auto* const b = sample_of<T>(args.images.b, piece.n, args.images.stride_b) + piece.first;
  float* const map = args.map ? args.map + piece.n * args.pixels + piece.first : nullptr;
  const float channels = static_cast<float>(args.channels);
  double sum = 0.0;
  for (int64_t p = threadIdx.x * kCount; p < piece.count; p += kThreads * kCount) {
    float squares[kCount] = {};
#pragma unroll(kCount > 4 ? 2 : 4)
    for (int64_t c = 0; c < args.channels; ++c) {
      const int64_t at = c * args.pixels + p;
      add_squares<T, kCount, kAligned>(a + at, b + at, piece.count - p, squares);
    }
    if (map) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (p + i < piece.count) map[p + i] = squares[i] / channels;
      }
    }
    sum += sum_of(squares);
  }
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) args.partial[blockIdx.x] = sum;
}

// An image is [pixels, C]. `group` neighbouring threads, a power of two up to a warp, share a pixel; a thread takes
// kCount neighbouring channels at a time, and C is a multiple of kCount.
template <class T, int kCount, bool kAligned>
__global__ void __launch_bounds__(kThreads) sum_channels_last(ImageArgs args, int group) {
  const Piece piece(args.pixels, kImagePiece);
  const int64_t start = piece.first * args.channels;
  const auto* const a = sample_of<T>(args.images.a, piece.n, args.images.stride_a) + start;
  const auto* const b = sample_of<T>(args.images.b, piece.n, args.images.stride_b) + start;
  float* const map = args.map ? args.map + piece.n * args.pixels + piece.first : nullptr;
  const float channels = static_cast<float>(args.channels);
  const int member = threadIdx.x % group;
  double sum = 0.0;
  // All threads go round equally often, for the shuffles; those beyond the last pixel add nothing.
  for (int64_t p0 = 0; p0 < piece.count; p0 += kThreads / group) {
    const int64_t p = p0 + threadIdx.x / group;
    float squares[kCount] = {};
    if (p < piece.count) {
#pragma unroll(kCount > 4 ? 2 : 4)
      for (int64_t c = member * kCount; c < args.channels; c += group * kCount) {
        const int64_t at = p * args.channels + c;
        add_squares<T, kCount, kAligned>(a + at, b + at, kCount, squares);
      }
    }
    float pixel = sum_of(squares);
    for (int offset = group / 2; offset > 0; offset /= 2) pixel += __shfl_xor_sync(kAllLanes, pixel, offset);
    if (member == 0 && p < piece.count) {
      if (map) map[p] = pixel / channels;
      sum += pixel;
    }
  }
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) args.partial[blockIdx.x] = sum;
}

// kWhole: the sample's elements are a multiple of a 16-byte load, and aligned to it.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) sum_elements(FeatureArgs args) {
  constexpr int kCount = kVector<T>;
  const Piece piece(args.elements, kFeaturePiece);
  const auto* const a = sample_of<T>(args.features.a, piece.n, args.features.stride_a) + piece.first;
  const auto* const b = sample_of<T>(args.features.b, piece.n, args.features.stride_b) + piece.first;
  float squares[kCount] = {};
#pragma unroll(kCount > 4 ? 2 : 4)
  for (int64_t i = threadIdx.x * kCount; i < piece.count; i += kThreads * kCount) {
    add_squares<T, kCount, kWhole>(a + i, b + i, piece.count - i, squares);
  }
  const double sum = sum_over_block(sum_of(squares));
  if (threadIdx.x == 0) args.partial[blockIdx.x] = sum;
}

// ---- second launch -----------------------------------------------------------------------------------------------

// Mean over the `a_sample` pieces of one sample; the warp's lanes take them in turn.
__device__ float mean_of(const double* partial, int64_t a_sample, double size) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < a_sample; i += kWarp) sum += partial[i];
  return static_cast<float>(sum_over_warp(sum) / size);
}

// One block of one warp a sample.
__global__ void __launch_bounds__(kWarp) finish(ImageArgs images, FeatureArgs features, bool has_features,
                                                float* residual, float* feature) {
  const int64_t n = blockIdx.x;
  const int64_t image_pieces = pieces(images.pixels, kImagePiece);
  const int64_t feature_pieces = pieces(features.elements, kFeaturePiece);
  const double image_size = static_cast<double>(images.channels * images.pixels);
  const float r = mean_of(images.partial + n * image_pieces, image_pieces, image_size);
  float f = 0.0f;
  if (has_features) {
    f = mean_of(features.partial + n * feature_pieces, feature_pieces, static_cast<double>(features.elements));
  }
  if (threadIdx.x == 0) {
    residual[n] = r;
    feature[n] = f;
  }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Whether every sample of both tensors starts on a 16-byte boundary and `run` elements are a whole number of loads.
template <class T>
bool aligned(const Pair& pair, int64_t run) {
  const auto address = reinterpret_cast<uintptr_t>(pair.a) | reinterpret_cast<uintptr_t>(pair.b);
  return address % 16 == 0 && (pair.stride_a | pair.stride_b | run) % kVector<T> == 0;
}

template <class T>
void sum_images(const ImageArgs& args, int64_t blocks, cudaStream_t stream) {
  constexpr int kCount = kVector<T>;
  if (!args.channels_last) {
    const auto kernel = aligned<T>(args.images, args.pixels) ? sum_planes<T, true> : sum_planes<T, false>;
    launch(kernel, blocks, kThreads, stream, args);
    return;
  }
  const bool whole = args.channels % kCount == 0;
  const int64_t loads = whole ? args.channels / kCount : args.channels;
  int group = 1;  // about four loads a thread
  while (group < kWarp && group * 4 < loads) group *= 2;
  const auto kernel = !whole ? sum_channels_last<T, 1, false>
      : aligned<T>(args.images, args.channels) ? sum_channels_last<T, kCount, true>
                                               : sum_channels_last<T, kCount, false>;
  launch(kernel, blocks, kThreads, stream, args, group);
}

template <class T>
void sum_features(const FeatureArgs& args, int64_t blocks, cudaStream_t stream) {
  const auto kernel = aligned<T>(args.features, args.elements) ? sum_elements<T, true> : sum_elements<T, false>;
  launch(kernel, blocks, kThreads, stream, args);
}

}  // namespace

const char* anomaly_score(int64_t n, const ImageArgs& images, const FeatureArgs* features, float* residual,
                          float* feature, int device, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const FeatureArgs none{};
  const FeatureArgs& f = features ? *features : none;
  const int64_t image_blocks = n * pieces(images.pixels, kImagePiece);
  const int64_t feature_blocks = n * pieces(f.elements, kFeaturePiece);
  if (n == 0) return nullptr;
  if (image_blocks > INT32_MAX || feature_blocks > INT32_MAX || n > INT32_MAX) return "more blocks than a grid holds";

  // This library's CUDA runtime is linked statically, and has its own idea of the current device.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (image_blocks > 0) {
    for_dtype(images.images.dtype, [&](auto element) { sum_images<decltype(element)>(images, image_blocks, stream); });
  }
  if (feature_blocks > 0) {
    for_dtype(f.features.dtype, [&](auto element) { sum_features<decltype(element)>(f, feature_blocks, stream); });
  }
  launch(finish, n, kWarp, stream, images, f, features != nullptr, residual, feature);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace raccgan
