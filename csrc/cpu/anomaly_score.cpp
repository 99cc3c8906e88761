// The anomaly score on a CPU: one read of each tensor, and the same bits whatever the batch, the number of threads
// and the processor.
//
// Threads take chunks of a sample, of fixed size. Inside a chunk float32 sums stay short (64 additions in a row, 32
// sums side by side); everything above them is added in float64, in a fixed order. The additions form the same tree on
// every target, and the compiler may not fuse multiplications into them (-ffp-contract=off), so that a threshold set on
// one machine means the same on another. The channels of a pixel are added in their order in both memory layouts, and
// the score comes from the per-pixel sums with the map and without: neither changes the score.
#include "kernels.h"
#include "simd/vector.h"
#include "threads.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
constexpr int kLanes = 32;  // sums side by side, in as many vectors as the target needs
constexpr int kVectors = kLanes / kWidth;
constexpr int64_t kShort = 64;  // additions in a row in float32
constexpr int64_t kBlock = kShort * kLanes;
constexpr int64_t kSquares = kMostChannelsLast;  // squares of a channels_last image held at a time, 16 KiB
static_assert(kImageChunk <= kBlock && kImageChunk % kLanes == 0 && kSquares % kLanes == 0);

double sum_of_lanes(const Floats (&sums)[kVectors]) {
  float lanes[kLanes];
  memcpy(lanes, sums, sizeof lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class T> Floats squared_difference(const typename T::Stored* a, const typename T::Stored* b) {
  const Floats d = T::load(a) - T::load(b);
  return d * d;
}

// use(i, squares) for the elements i, i + 1, ... of (a - b)^2, a vector at a time; zeros fill the last one. The caller
// reads `next` elements further afterwards. Prefetching that saves up to half of the time, since the processor's own
// prefetcher starts anew in every plane and on every page.
template <class T, class Use>
void for_squares(const typename T::Stored* a, const typename T::Stored* b, int64_t count, int64_t next,
                 const Use& use) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kWidth <= count; i += kWidth) {
    __builtin_prefetch(a + i + next, 0, 2);  // into the second-level cache
    __builtin_prefetch(b + i + next, 0, 2);
    use(i, squared_difference<T>(a + i, b + i));
  }
  if (i == count) return;
  typename T::Stored rest_a[kWidth] = {}, rest_b[kWidth] = {};
  memcpy(rest_a, a + i, (count - i) * sizeof *a);
  memcpy(rest_b, b + i, (count - i) * sizeof *b);
  use(i, squared_difference<T>(rest_a, rest_b));
}

template <class T>
void add_squares(Floats (&sums)[kVectors], const typename T::Stored* a, const typename T::Stored* b) {
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] += squared_difference<T>(a + v * kWidth, b + v * kWidth);
}

// Sum of (a - b)^2 over at most kBlock elements.
template <class T> double sum_of_block(const typename T::Stored* a, const typename T::Stored* b, int64_t count) {
  Floats sums[kVectors] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add_squares<T>(sums, a + i, b + i);
  if (i < count) {
    typename T::Stored rest_a[kLanes] = {}, rest_b[kLanes] = {};
    memcpy(rest_a, a + i, (count - i) * sizeof *a);
    memcpy(rest_b, b + i, (count - i) * sizeof *b);
    add_squares<T>(sums, rest_a, rest_b);
  }
  return sum_of_lanes(sums);
}

// Of the chunk of sample n that begins at `first`.
template <class T> double sum_of_chunk(const FeatureArgs& args, int64_t n, int64_t first) {
  const int64_t count = least(kFeatureChunk, args.elements - first);
  const auto* a = static_cast<const typename T::Stored*>(args.features.a) + n * args.features.stride_a + first;
  const auto* b = static_cast<const typename T::Stored*>(args.features.b) + n * args.features.stride_b + first;
  double sum = 0;
  for (int64_t i = 0; i < count; i += kBlock) {
    sum += sum_of_block<T>(a + i, b + i, least(kBlock, count - i));
  }
  return sum;
}

// sums[p] = the sum over the channels of (a - b)^2 at pixel p, for `count` <= kImageChunk pixels of an image whose
// channels lie `plane` elements apart. Every kShort channels are added up apart, as the other layout does.
template <class T>
void sum_planes(const typename T::Stored* a, const typename T::Stored* b, int64_t channels, int64_t plane,
                int64_t count, float* sums) {
  alignas(64) float run[kImageChunk];
  for (int64_t c = 0; c < channels; ++c) {
    float* const to = c < kShort ? sums : run;
    const int64_t next = c + 1 < channels ? plane : count - c * plane;
    if (c % kShort == 0) {
      for_squares<T>(a, b, count, next, [=](int64_t i, Floats squares) { store(to + i, squares); });
    } else {
      for_squares<T>(a, b, count, next, [=](int64_t i, Floats squares) { store(to + i, load(to + i) + squares); });
    }
    if (to == run && (c % kShort == kShort - 1 || c == channels - 1)) {
      for (int64_t i = 0; i < count; ++i) sums[i] += run[i];
    }
    a += plane;
    b += plane;
  }
}

// sums[p] = squares[p, 0] + squares[p, 1] + ..., in that order, for `count` pixels. kChannels > 0 makes the number of
// channels a constant, with which the compiler vectorises over the pixels.
template <int kChannels> void sum_channels(const float* squares, int64_t channels, int64_t count, float* sums) {
  const int64_t step = kChannels > 0 ? kChannels : channels;
  for (int64_t p = 0; p < count; ++p) {
    const float* const at = squares + p * step;
    float sum = 0;
    for (int64_t c0 = 0; c0 < step; c0 += kShort) {
      float run = at[c0];
      for (int64_t c = c0 + 1; c < step && c < c0 + kShort; ++c) run += at[c];
      sum = c0 == 0 ? run : sum + run;
    }
    sums[p] = sum;
  }
}

// The same sums as sum_planes, of an image whose channels lie side by side.
template <class T>
void sum_channels_last(const typename T::Stored* a, const typename T::Stored* b, int64_t channels, int64_t count,
                       float* sums) {
  alignas(64) float squares[kSquares + kWidth];
  const int64_t most = kSquares / channels;
  for (int64_t p = 0; p < count; p += most) {
    const int64_t here = least(most, count - p);
    for_squares<T>(a + p * channels, b + p * channels, here * channels, here * channels,
                   [&](int64_t i, Floats v) { store(squares + i, v); });
    const auto sum = channels == 3 ? sum_channels<3> : channels == 4 ? sum_channels<4> : sum_channels<0>;
    sum(squares, channels, here, sums + p);
  }
}

template <class T> double sum_of_chunk(const ImageArgs& args, int64_t n, int64_t first) {
  const int64_t count = least(kImageChunk, args.pixels - first);
  alignas(64) float sums[kImageChunk];
  for (int64_t i = args.channels > 0 ? count : 0; i < kImageChunk; ++i) sums[i] = 0;
  const int64_t start = args.channels_last ? first * args.channels : first;
  const auto* a = static_cast<const typename T::Stored*>(args.images.a) + n * args.images.stride_a + start;
  const auto* b = static_cast<const typename T::Stored*>(args.images.b) + n * args.images.stride_b + start;
  if (args.channels_last) {
    sum_channels_last<T>(a, b, args.channels, count, sums);
  } else {
    sum_planes<T>(a, b, args.channels, args.pixels, count, sums);
  }
  if (args.map != nullptr) {
    float* const map = args.map + n * args.pixels + first;
    for (int64_t i = 0; i < count; ++i) map[i] = sums[i] / static_cast<float>(args.channels);
  }
  Floats lanes[kVectors] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) lanes[v] += load(sums + i + v * kWidth);
  }
  return sum_of_lanes(lanes);
}

// means[i] = the mean of (a - b)^2 over sample i, by chunks of `chunk` pixels or elements, `size` of them a sample and each
// of so many channels. Chunks are added in float64 and in their order.
template <class T, class Args>
void find_means_as(const Args& args, int64_t n, int64_t size, int64_t chunk, int64_t channels, float* means) {
  const int64_t a_sample = chunks(size, chunk);
  const Memory<double> partial(n * a_sample);
  share_out(n * a_sample, channels * least(size, chunk), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) partial[i] = sum_of_chunk<T>(args, i / a_sample, i % a_sample * chunk);
  });
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t p = i * a_sample; p < (i + 1) * a_sample; ++p) sum += partial[p];
    means[i] = static_cast<float>(sum / static_cast<double>(channels * size));
  }
}

template <class Args, class... Others> void find_means(Dtype dtype, const Args& args, Others... others) {
  switch (dtype) {
    case Dtype::kFloat32: return find_means_as<Float32>(args, others...);
    case Dtype::kBFloat16: return find_means_as<BFloat16>(args, others...);
    case Dtype::kFloat16: return find_means_as<Float16>(args, others...);
  }
}
}  // namespace

void anomaly_score(int64_t n, const ImageArgs& images, const FeatureArgs* features, float* residual, float* feature) {
  find_means(images.images.dtype, images, n, images.pixels, kImageChunk, images.channels, residual);
  if (features != nullptr) {
    find_means(features->features.dtype, *features, n, features->elements, kFeatureChunk, int64_t{1}, feature);
  } else {
    memset(feature, 0, n * sizeof *feature);
  }
}
}  // namespace raccgan::RACCGAN_TARGET
