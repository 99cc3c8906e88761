// The anomaly score on a GPU: one read of each tensor, no atomics. Not yet run on a GPU.
//
// Two launches. In the first a block sums (a - b)^2 over one chunk of a sample: float32 within a thread, float64 across
// threads. The second adds a sample's chunks up in float64, in a fixed order. Which thread adds what depends on the
// sample's shape and dtype alone, not on alignment or batch, so a sample's score is always the same.
#include "anomaly_score.h"
#include "common/columns.h"

namespace raccgan::cuda {
namespace {
constexpr int kBlock = 128;  // threads

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

template <int kCount> __device__ float sum_of(const float (&values)[kCount]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += values[i];
  return sum;
}

// Every thread of the block calls it; the sum is valid in thread 0.
__device__ double sum_over_block(double value) {
  __shared__ double warps[kBlock / kWarp];
  value = sum_over_group(value, kWarp);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  for (int i = 0; i < kBlock / kWarp; ++i) sum += warps[i];
  return sum;
}

// The block's chunk: sample n, elements or pixels first <= i < first + count; a pixel has `width` elements.
template <class T> struct Chunk {
  int64_t n, first, count;
  const typename T::Stored *a, *b;

  __device__ Chunk(const ComparedTensors& pair, int64_t size, int64_t chunk, int64_t width = 1) {
    const int64_t a_sample = chunks(size, chunk);
    n = blockIdx.x / a_sample;
    first = blockIdx.x % a_sample * chunk;
    count = size - first < chunk ? size - first : chunk;
    a = static_cast<const typename T::Stored*>(pair.a) + n * pair.stride_a + first * width;
    b = static_cast<const typename T::Stored*>(pair.b) + n * pair.stride_b + first * width;
  }
};

// An image is [C, pixels]. A thread takes kVector neighbouring pixels at a time, through all channels.
template <class T, bool kAligned> __global__ void __launch_bounds__(kBlock) sum_planes(ImageArgs args) {
  constexpr int kCount = kVector<T>;
  const Chunk<T> chunk(args.images, args.pixels, kImageChunk);
  float* const map = args.map ? args.map + chunk.n * args.pixels + chunk.first : nullptr;
  const float channels = static_cast<float>(args.channels);
  double sum = 0.0;
  for (int64_t p = threadIdx.x * kCount; p < chunk.count; p += kBlock * kCount) {
    float squares[kCount] = {};
#pragma unroll(kCount > 4 ? 2 : 4)
    for (int64_t c = 0; c < args.channels; ++c) {
      const int64_t at = c * args.pixels + p;
      add_squares<T, kCount, kAligned>(chunk.a + at, chunk.b + at, chunk.count - p, squares);
    }
    if (map) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (p + i < chunk.count) map[p + i] = squares[i] / channels;
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
__global__ void __launch_bounds__(kBlock) sum_channels_last(ImageArgs args, int group) {
  const Chunk<T> chunk(args.images, args.pixels, kImageChunk, args.channels);
  float* const map = args.map ? args.map + chunk.n * args.pixels + chunk.first : nullptr;
  const float channels = static_cast<float>(args.channels);
  const int member = threadIdx.x % group;
  double sum = 0.0;
  // All threads go round equally often, for the shuffles; those beyond the last pixel add nothing.
  for (int64_t p0 = 0; p0 < chunk.count; p0 += kBlock / group) {
    const int64_t p = p0 + threadIdx.x / group;
    float squares[kCount] = {};
    if (p < chunk.count) {
#pragma unroll(kCount > 4 ? 2 : 4)
      for (int64_t c = member * kCount; c < args.channels; c += group * kCount) {
        const int64_t at = p * args.channels + c;
        add_squares<T, kCount, kAligned>(chunk.a + at, chunk.b + at, kCount, squares);
      }
    }
    const float pixel = sum_over_group(sum_of(squares), group);
    if (member == 0 && p < chunk.count) {
      if (map) map[p] = pixel / channels;
      sum += pixel;
    }
  }
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) args.partial[blockIdx.x] = sum;
}

// kWhole: the sample's elements are a multiple of a 16-byte load, and aligned to it.
template <class T, bool kWhole> __global__ void __launch_bounds__(kBlock) sum_elements(FeatureArgs args) {
  constexpr int kCount = kVector<T>;
  const Chunk<T> chunk(args.features, args.elements, kFeatureChunk);
  float squares[kCount] = {};
#pragma unroll(kCount > 4 ? 2 : 4)
  for (int64_t i = threadIdx.x * kCount; i < chunk.count; i += kBlock * kCount) {
    add_squares<T, kCount, kWhole>(chunk.a + i, chunk.b + i, chunk.count - i, squares);
  }
  const double sum = sum_over_block(sum_of(squares));
  if (threadIdx.x == 0) args.partial[blockIdx.x] = sum;
}

// Mean over the `a_sample` chunks of one sample; the warp's lanes take them in turn.
__device__ float mean_of(const double* partial, int64_t a_sample, double size) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < a_sample; i += kWarp) sum += partial[i];
  return static_cast<float>(sum_over_group(sum, kWarp) / size);
}

__global__ void __launch_bounds__(kWarp)
    finish(ImageArgs images, FeatureArgs features, bool has_features, float* residual, float* feature) {
  const int64_t n = blockIdx.x;
  const int64_t image_chunks = chunks(images.pixels, kImageChunk);
  const int64_t feature_chunks = chunks(features.elements, kFeatureChunk);
  const double image_size = static_cast<double>(images.channels * images.pixels);
  const float r = mean_of(images.partial + n * image_chunks, image_chunks, image_size);
  float f = 0.0f;
  if (has_features) {
    f = mean_of(features.partial + n * feature_chunks, feature_chunks, static_cast<double>(features.elements));
  }
  if (threadIdx.x == 0) {
    residual[n] = r;
    feature[n] = f;
  }
}

// Whether every sample of both tensors starts on a 16-byte boundary and `run` elements are a whole number of loads.
template <class T> bool aligned(const ComparedTensors& pair, int64_t run) {
  const auto address = reinterpret_cast<uintptr_t>(pair.a) | reinterpret_cast<uintptr_t>(pair.b);
  return address % 16 == 0 && (pair.stride_a | pair.stride_b | run) % kVector<T> == 0;
}

template <class T> void sum_images(Queue& queue, const ImageArgs& args, int64_t blocks) {
  constexpr int kCount = kVector<T>;
  if (!args.channels_last) {
    const auto kernel = aligned<T>(args.images, args.pixels) ? sum_planes<T, true> : sum_planes<T, false>;
    return queue(kernel, blocks, kBlock, args);
  }
  const bool whole = args.channels % kCount == 0;
  const int group = threads_a_pixel(args.channels, whole ? kCount : 1);
  const auto kernel = !whole                                   ? sum_channels_last<T, 1, false>
                      : aligned<T>(args.images, args.channels) ? sum_channels_last<T, kCount, true>
                                                               : sum_channels_last<T, kCount, false>;
  queue(kernel, blocks, kBlock, args, group);
}
}  // namespace

const char* anomaly_score(int64_t n, const ImageArgs& images, const FeatureArgs* features, float* residual,
                          float* feature, int device, void* stream) {
  Queue queue(device, stream);
  const FeatureArgs f = features ? *features : FeatureArgs{};
  for_dtype(images.images.dtype, [&](auto element) {
    sum_images<decltype(element)>(queue, images, n * chunks(images.pixels, kImageChunk));
  });
  for_dtype(f.features.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = aligned<T>(f.features, f.elements) ? sum_elements<T, true> : sum_elements<T, false>;
    queue(kernel, n * chunks(f.elements, kFeatureChunk), kBlock, f);
  });
  queue(finish, n, kWarp, images, f, features != nullptr, residual, feature);
  return queue.error();
}
}  // namespace raccgan::cuda
