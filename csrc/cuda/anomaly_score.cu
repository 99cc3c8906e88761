// The anomaly score on a GPU: one read of each tensor, no atomics.
//
// Two launches. In the first a block sums (a - b)^2 over one chunk of a sample: float32 within a thread, float64 across
// threads. The second adds a sample's chunks up in float64, in a fixed order. Which thread adds what depends on the
// sample's shape and dtype alone, not on alignment or batch, so a sample's score is always the same.
#include "common/columns.h"
#include "passes.h"

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

// partial[block] = the sum over a block's threads, all of which call it.
__device__ void write_sum(double value, double* partial) {
  __shared__ double warps[kBlock / kWarp];
  value = sum_over_group(value, kWarp);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  for (int i = 0; i < kBlock / kWarp; ++i) sum += warps[i];
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The block's chunk: sample n, elements or pixels first <= i < first + count; a pixel has `width` elements.
template <class T> struct Chunk {
  const ComparedTensors& pair;
  int64_t size, chunk, width = 1;
  int64_t n = blockIdx.x / chunks(size, chunk), first = blockIdx.x % chunks(size, chunk) * chunk;
  int64_t count = least(size - first, chunk);
  const typename T::Stored* a = static_cast<const typename T::Stored*>(pair.a) + n * pair.stride_a + first * width;
  const typename T::Stored* b = static_cast<const typename T::Stored*>(pair.b) + n * pair.stride_b + first * width;
};

// An image is [C, pixels]. A thread takes kVector neighbouring pixels at a time, through all channels.
template <class T, bool kAligned> __global__ void __launch_bounds__(kBlock) sum_planes(ImageArgs args) {
  constexpr int kCount = kVector<T>;
  const Chunk<T> chunk{args.images, args.pixels, kImageChunk};
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
  write_sum(sum, args.partial);
}

// An image is [pixels, C]. `group` neighbouring threads, a power of two up to a warp, share a pixel; a thread takes
// kCount neighbouring channels at a time, and C is a multiple of kCount.
template <class T, int kCount, bool kAligned>
__global__ void __launch_bounds__(kBlock) sum_channels_last(ImageArgs args, int group) {
  const Chunk<T> chunk{args.images, args.pixels, kImageChunk, args.channels};
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
  write_sum(sum, args.partial);
}

// kWhole: the sample's elements are a multiple of a 16-byte load, and aligned to it.
template <class T, bool kWhole> __global__ void __launch_bounds__(kBlock) sum_elements(FeatureArgs args) {
  constexpr int kCount = kVector<T>;
  const Chunk<T> chunk{args.features, args.elements, kFeatureChunk};
  float squares[kCount] = {};
#pragma unroll(kCount > 4 ? 2 : 4)
  for (int64_t i = threadIdx.x * kCount; i < chunk.count; i += kBlock * kCount) {
    add_squares<T, kCount, kWhole>(chunk.a + i, chunk.b + i, chunk.count - i, squares);
  }
  write_sum(sum_of(squares), args.partial);
}

// Mean of sample n from partial [N, chunks]; the warp's lanes take the chunks in turn.
__device__ float mean_of(const double* partial, int64_t n, int64_t chunks, int64_t size) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kWarp) sum += partial[n * chunks + i];
  return static_cast<float>(sum_over_group(sum, kWarp) / static_cast<double>(size));
}

__global__ void __launch_bounds__(kWarp)
    finish(ImageArgs images, FeatureArgs features, bool has_features, float* residual, float* feature) {
  const int64_t n = blockIdx.x;
  const float r = mean_of(images.partial, n, chunks(images.pixels, kImageChunk), images.channels * images.pixels);
  const int64_t feature_chunks = chunks(features.elements, kFeatureChunk);
  const float f = has_features ? mean_of(features.partial, n, feature_chunks, features.elements) : 0.0f;
  if (threadIdx.x == 0) {
    residual[n] = r;
    feature[n] = f;
  }
}

// Whether every sample of both tensors starts on a 16-byte boundary and `run` elements are a whole number of loads.
bool aligned(const ComparedTensors& pair, int64_t run) {
  return allow_vectors(pair.dtype, pair.stride_a | pair.stride_b | run, pair.a, pair.b);
}

template <class T> void sum_images(Queue& queue, const ImageArgs& args, int64_t blocks) {
  constexpr int kCount = kVector<T>;
  if (!args.channels_last) {
    const auto kernel = aligned(args.images, args.pixels) ? sum_planes<T, true> : sum_planes<T, false>;
    return queue(kernel, blocks, kBlock, args);
  }
  const bool whole = args.channels % kCount == 0;
  const int group = threads_a_pixel(args.channels, whole ? kCount : 1);
  const auto kernel = !whole                                ? sum_channels_last<T, 1, false>
                      : aligned(args.images, args.channels) ? sum_channels_last<T, kCount, true>
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
    const auto kernel = aligned(f.features, f.elements) ? sum_elements<T, true> : sum_elements<T, false>;
    queue(kernel, n * chunks(f.elements, kFeatureChunk), kBlock, f);
  });
  queue(finish, n, kWarp, images, f, features != nullptr, residual, feature);
  return queue.error;
}
}  // namespace raccgan::cuda
