// Moments of each channel, and their gradient, one pass over x each.
//
// What is summed is the distance from a pivot: a variance from sums of squares would cancel where the mean is large. A
// group of vectors goes down the pixels of a piece with its sums in registers.
#include "moments.h"

#include "simd/lanes.h"

namespace raccgan {
namespace {

constexpr int64_t kGroup = 4;  // vectors whose sums are in registers together
constexpr int64_t kRun = 32;   // pixels added up before they join the piece's sum, which keeps rounding small

static_assert(kMomentsChannels % (kGroup * kWidth) == 0);

// kVectors vectors of channels from `channel` on; the last may have fewer than kWidth of them.
template <class T, int kVectors>
void moments_group(const MomentsArgs& args, int64_t channel, int64_t first, int64_t last, float* partial) {
  const int64_t c = args.c;
  const auto* const x = static_cast<const typename T::Stored*>(args.x) + channel;
  const bool partly = channel + kVectors * kWidth > c;  // then kVectors is 1
  const Lanes l{0, channel, 1, least(kWidth, c - channel)};
  const auto read = [&](const typename T::Stored* from) __attribute__((always_inline)) {
    return partly ? load_lanes<T>(from, l, 0) : T::load(from);
  };
  Floats pivot[kVectors], sum[kVectors] = {}, squares[kVectors] = {};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    pivot[v] = partly ? load_lanes<Float32>(args.pivot + channel, l, 0) : load(args.pivot + channel + v * kWidth);
  }
  for (int64_t run = first; run < last; run += kRun) {
    Floats run_sum[kVectors] = {}, run_squares[kVectors] = {};
    for (int64_t m = run; m < least(last, run + kRun); ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats d = read(x + m * c + v * kWidth) - pivot[v];
        run_sum[v] += d;
        run_squares[v] = multiply_add(d, d, run_squares[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[v] += run_sum[v];
      squares[v] += run_squares[v];
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
void moments_as(const MomentsArgs& args, int64_t begin, int64_t end) {
  const int64_t across = moments_tasks(1, args.c);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t piece = task / across, first = piece * kMomentsPiece, last = least(args.m, first + kMomentsPiece);
    float* const partial = args.partial + piece * 2 * args.c;
    int64_t channel = task % across * kMomentsChannels;
    const int64_t end_channel = least(args.c, channel + kMomentsChannels);
    for (; channel + kGroup * kWidth <= end_channel; channel += kGroup * kWidth) {
      moments_group<T, kGroup>(args, channel, first, last, partial);
    }
    for (; channel < end_channel; channel += kWidth) moments_group<T, 1>(args, channel, first, last, partial);
  }
}

template <class T>
void affine_as(const AffineArgs& args, int64_t begin, int64_t end) {
  const int64_t c = args.c, whole = c / kWidth * kWidth;
  for (int64_t m = begin; m < end; ++m) {
    const auto* const x = static_cast<const typename T::Stored*>(args.x) + m * c;
    auto* const grad = static_cast<typename T::Stored*>(args.grad) + m * c;
    for (int64_t i = 0; i < whole; i += kWidth) {
      const Floats d = T::load(x + i) - load(args.centre + i);
      T::store(grad + i, multiply_add(d, load(args.slope + i), load(args.constant + i)));
    }
    if (whole < c) {
      const Lanes l{0, whole, 1, c - whole};
      const Floats slope = load_lanes<Float32>(args.slope + whole, l, 0);
      const Floats centre = load_lanes<Float32>(args.centre + whole, l, 0);
      const Floats constant = load_lanes<Float32>(args.constant + whole, l, 0);
      store_lanes<T>(grad + whole, multiply_add(load_lanes<T>(x + whole, l, 0) - centre, slope, constant), l, 0);
    }
  }
}

template <class T>
void pivot_as(const MomentsArgs& args, float* pivot) {
  for (int64_t i = 0; i < args.c; i += kWidth) {
    const Lanes l{0, i, 1, least(kWidth, args.c - i)};
    store_lanes<Float32>(pivot + i, View<T>(args.x, 1, args.m, args.c, l).pivot(1), l, 0);
  }
}

}  // namespace

namespace RACCGAN_TARGET {

void pivot(const MomentsArgs& args, float* pivot) {
  args.dtype == Dtype::kFloat32 ? pivot_as<Float32>(args, pivot) : pivot_as<BFloat16>(args, pivot);
}

void moments(const MomentsArgs& args, int64_t begin, int64_t end) {
  args.dtype == Dtype::kFloat32 ? moments_as<Float32>(args, begin, end) : moments_as<BFloat16>(args, begin, end);
}

void affine(const AffineArgs& args, int64_t begin, int64_t end) {
  args.dtype == Dtype::kFloat32 ? affine_as<Float32>(args, begin, end) : affine_as<BFloat16>(args, begin, end);
}

}  // namespace RACCGAN_TARGET
}  // namespace raccgan
