// Moments of each channel, and their gradient, one pass over x each.
//
// Sums are of the distance from a center: a variance from sums of squares would cancel where the mean is large. A few
// vectors go down the pixels of a chunk with their sums in registers.
#include "moments.h"
#include "simd/lanes.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
constexpr int64_t kTogether = 4;  // vectors whose sums are in registers at a time
constexpr int64_t kShort = 32;    // pixels added up before they join the chunk's sum, which keeps rounding small

static_assert(kMomentsChannels % (kTogether * kWidth) == 0);

// kVectors vectors of channels from `channel` on; the last may have fewer than kWidth of them.
template <class T, int kVectors>
void moments_of_vectors(const MomentsArgs& args, const float* centers, int64_t channel, int64_t first, int64_t last,
                        float* partial) {
  const int64_t c = args.channels;
  const auto* const x = static_cast<const typename T::Stored*>(args.x) + channel;
  const bool partly = channel + kVectors * kWidth > c;  // then kVectors is 1
  const Lanes l{0, channel, 1, least(kWidth, c - channel)};
  const auto read = [&](const typename T::Stored* from)
                        RACCGAN_INLINE { return partly ? load_lanes<T>(from, l, 0) : T::load(from); };
  Floats center[kVectors], sum[kVectors] = {}, squares[kVectors] = {};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    center[v] = partly ? load_lanes<Float32>(centers + channel, l, 0) : load(centers + channel + v * kWidth);
  }
  for (int64_t from = first; from < last; from += kShort) {
    Floats short_sum[kVectors] = {}, short_squares[kVectors] = {};
    for (int64_t m = from; m < least(last, from + kShort); ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats d = read(x + m * c + v * kWidth) - center[v];
        short_sum[v] += d;
        short_squares[v] = multiply_add(d, d, short_squares[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[v] += short_sum[v];
      squares[v] += short_squares[v];
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    float lanes[2][kWidth];
    store(lanes[0], sum[v]);
    store(lanes[1], squares[v]);
    for (int64_t i = 0; i < least(kWidth, c - channel - v * kWidth); ++i) {
      partial[channel + v * kWidth + i] = lanes[0][i];
      partial[c + channel + v * kWidth + i] = lanes[1][i];
    }
  }
}

template <class T>
void moments_as(const MomentsArgs& args, const float* center, float* partials, int64_t begin, int64_t end) {
  const int64_t across = moments_tasks(1, args.channels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task / across, first = chunk * kMomentsChunk;
    const int64_t last = least(args.pixels, first + kMomentsChunk);
    float* const partial = partials + chunk * 2 * args.channels;
    int64_t channel = task % across * kMomentsChannels;
    const int64_t end_channel = least(args.channels, channel + kMomentsChannels);
    for (; channel + kTogether * kWidth <= end_channel; channel += kTogether * kWidth) {
      moments_of_vectors<T, kTogether>(args, center, channel, first, last, partial);
    }
    for (; channel < end_channel; channel += kWidth) {
      moments_of_vectors<T, 1>(args, center, channel, first, last, partial);
    }
  }
}

template <class T> void affine_as(const AffineArgs& args, int64_t begin, int64_t end) {
  const int64_t c = args.of.channels, whole = c / kWidth * kWidth;
  for (int64_t m = begin; m < end; ++m) {
    const auto* const x = static_cast<const typename T::Stored*>(args.of.x) + m * c;
    auto* const grad = static_cast<typename T::Stored*>(args.grad) + m * c;
    for (int64_t i = 0; i < whole; i += kWidth) {
      const Floats d = T::load(x + i) - load(args.center + i);
      T::store(grad + i, multiply_add(d, load(args.slope + i), load(args.constant + i)));
    }
    if (whole < c) {
      const Lanes l{0, whole, 1, c - whole};
      const Floats slope = load_lanes<Float32>(args.slope + whole, l, 0);
      const Floats center = load_lanes<Float32>(args.center + whole, l, 0);
      const Floats constant = load_lanes<Float32>(args.constant + whole, l, 0);
      store_lanes<T>(grad + whole, multiply_add(load_lanes<T>(x + whole, l, 0) - center, slope, constant), l, 0);
    }
  }
}

template <class T> void find_center_as(const MomentsArgs& args, float* center) {
  for (int64_t i = 0; i < args.channels; i += kWidth) {
    const Lanes l{0, i, 1, least(kWidth, args.channels - i)};
    store_lanes<Float32>(center + i, View<T>(args.x, 1, args.pixels, args.channels, l).center(1), l, 0);
  }
}
}  // namespace

void find_center(const MomentsArgs& args, float* center) {
  args.dtype == Dtype::kFloat32 ? find_center_as<Float32>(args, center) : find_center_as<BFloat16>(args, center);
}

void moments(const MomentsArgs& args, const float* center, float* partial, int64_t begin, int64_t end) {
  RACCGAN_OF_DTYPE(args.dtype, moments_as)(args, center, partial, begin, end);
}

void affine(const AffineArgs& args, int64_t begin, int64_t end) {
  args.of.dtype == Dtype::kFloat32 ? affine_as<Float32>(args, begin, end) : affine_as<BFloat16>(args, begin, end);
}
}  // namespace raccgan::RACCGAN_TARGET
