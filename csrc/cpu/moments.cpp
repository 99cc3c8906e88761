// Moments of each channel, and their gradient, one pass over x each.
//
// Sums are of the distance from a center: a variance from sums of squares would cancel where the mean is large. A few
// vectors go down the pixels of a chunk with their sums in registers.
#include "kernels.h"
#include "simd/runs.h"
#include "threads.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
constexpr int64_t kTogether = 4;  // vectors whose sums are in registers at a time
constexpr int64_t kShort = 32;    // pixels added up before they join the chunk's sum, which keeps rounding small
constexpr int64_t kChunk = 1024;  // pixels: what float32 adds up before float64 does; never by threads
constexpr int64_t kChannels = 64;  // of a task, so that threads share a small batch of many channels too
static_assert(kChannels % (kTogether * kWidth) == 0);

int64_t parts(int64_t count, int64_t size) { return rounded_up(count, size) / size; }

// Roughly the mean: of a few pixels far apart.
template <class T> void find_center_as(const MomentsArgs& args, float* center) {
  constexpr int64_t kPixels = 8;
  const auto* const x = static_cast<const typename T::Stored*>(args.x);
  for_lanes(args.channels, [&](auto lanes, int64_t c) RACCGAN_INLINE {
    Floats sum{};
    for (int64_t i = 0; i < kPixels; ++i) {
      sum += lanes.template load<T>(x + (2 * i + 1) * args.pixels / (2 * kPixels) * args.channels + c);
    }
    lanes.store(center + c, sum / static_cast<float>(kPixels));
  });
}

// The sums of d and d^2, d = x - center, over pixels first <= m < last of kVectors vectors of channels: to [2, C].
template <class T, int kVectors, class Lanes>
void sum_vectors(const MomentsArgs& args, const Lanes& lanes, int64_t channel, const float* centers, int64_t first,
                 int64_t last, float* to) {
  const int64_t c = args.channels;
  const auto* const x = static_cast<const typename T::Stored*>(args.x) + channel;
  Floats center[kVectors], sum[kVectors] = {}, squares[kVectors] = {};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) center[v] = lanes.load(centers + channel + v * kWidth);
  for (int64_t from = first; from < last; from += kShort) {
    Floats short_sum[kVectors] = {}, short_squares[kVectors] = {};
    for (int64_t m = from; m < least(last, from + kShort); ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats d = lanes.template load<T>(x + m * c + v * kWidth) - center[v];
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
    lanes.store(to + channel + v * kWidth, sum[v]);
    lanes.store(to + c + channel + v * kWidth, squares[v]);
  }
}

// partial [chunks, 2, C]
template <class T>
void sum_moments_as(const MomentsArgs& args, const float* center, float* partial, int64_t begin, int64_t end) {
  const int64_t across = parts(args.channels, kChannels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task / across * kChunk, last = least(args.pixels, first + kChunk);
    float* const to = partial + task / across * 2 * args.channels;
    int64_t channel = task % across * kChannels;
    const int64_t end_channel = least(args.channels, channel + kChannels);
    for (; channel + kTogether * kWidth <= end_channel; channel += kTogether * kWidth) {
      sum_vectors<T, kTogether>(args, Whole{}, channel, center, first, last, to);
    }
    for_lanes(end_channel - channel,
              [&](auto lanes, int64_t at) { sum_vectors<T, 1>(args, lanes, channel + at, center, first, last, to); });
  }
}

// grad[m, c] = slope[c] (x[m, c] - mean[c]) + constant[c]: nothing cancels where x is far from zero.
struct AffineArgs : MomentsArgs {
  const float *slope, *mean, *constant;
  void* grad;
};

template <class T> void affine_as(const AffineArgs& args, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const auto* const x = static_cast<const typename T::Stored*>(args.x) + m * args.channels;
    auto* const grad = static_cast<typename T::Stored*>(args.grad) + m * args.channels;
    for_lanes(args.channels, [&](auto lanes, int64_t c) RACCGAN_INLINE {
      const Floats d = lanes.template load<T>(x + c) - lanes.load(args.mean + c);
      lanes.template store<T>(grad + c, multiply_add(d, lanes.load(args.slope + c), lanes.load(args.constant + c)));
    });
  }
}
}  // namespace

void moments(const MomentsArgs& args, float* mean, float* var) {
  const int64_t m = args.pixels, c = args.channels, chunks = parts(m, kChunk), tasks = chunks * parts(c, kChannels);
  const Memory<> center(c), partial(chunks * 2 * c);
  RACCGAN_OF_DTYPE(args.dtype, find_center_as)(args, center);
  const auto sum_moments = RACCGAN_OF_DTYPE(args.dtype, sum_moments_as);
  share_out(tasks, m * c / tasks, [&](int64_t begin, int64_t end) { sum_moments(args, center, partial, begin, end); });
  for (int64_t i = 0; i < c; ++i) {
    double sum = 0, squares = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += partial[chunk * 2 * c + i];
      squares += partial[(chunk * 2 + 1) * c + i];
    }
    const double distance = sum / m, spread = squares / m - distance * distance;
    mean[i] = static_cast<float>(center[i] + distance);
    var[i] = static_cast<float>(spread < 0 ? 0 : spread);  // NaN stays NaN
  }
}

void moments_backward(const MomentsArgs& args, const float* grad_mean, const float* grad_var, const float* mean,
                      void* grad) {
  const int64_t m = args.pixels, c = args.channels;
  const Memory<> slope(c), constant(c);
  for (int64_t i = 0; i < c; ++i) {
    slope[i] = static_cast<float>(2.0 * grad_var[i] / m);
    constant[i] = static_cast<float>(grad_mean[i] / static_cast<double>(m));
  }
  const auto affine = RACCGAN_OF_DTYPE(args.dtype, affine_as);
  const AffineArgs affine_args{args, slope, mean, constant, grad};
  share_out(m, c, [&](int64_t begin, int64_t end) { affine(affine_args, begin, end); });
}
}  // namespace raccgan::RACCGAN_TARGET
