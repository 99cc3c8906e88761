// What the depthwise kernels hold in scratch memory: a band of rows of the channels of one vector. See depthwise.cpp.
//
// Included by the per-target sources only. Everything here is in an anonymous namespace, for the reason in targets.h.
#pragma once

#include "depthwise.h"
#include "vector.h"

namespace raccgan {
namespace {

static_assert(kWidth <= kMaxLanes);

// ---- what a vector holds -----------------------------------------------------------------------------------------

// Lane s * channels + c holds channel `channel` + c of sample `sample` + s.
struct Lanes {
  int64_t sample, channel, samples, channels;
};

int64_t channels_a_vector(const DepthwiseShape& s) { return least(s.c, kWidth); }
int64_t samples_a_vector(const DepthwiseShape& s) { return s.c < kWidth ? kWidth / s.c : 1; }
int64_t channel_blocks(const DepthwiseShape& s) { return rounded_up(s.c, kWidth) / kWidth; }

// The block of channels, and the samples from `sample` on but before `end`.
Lanes lanes_of(const DepthwiseShape& s, int64_t block, int64_t sample, int64_t end) {
  const int64_t channel = block * kWidth;
  return {sample, channel, least(samples_a_vector(s), end - sample), least(channels_a_vector(s), s.c - channel)};
}

bool full(const Lanes& l) { return l.channels == kWidth; }

// use(channels), where the usual few channels of an image are a constant, so that loops over them unroll.
template <class Use>
inline __attribute__((always_inline)) void with_channels(const Lanes& l, const Use& use) {
  if (l.channels == 1) return use(1);
  if (l.channels == 3) return use(3);
  use(l.channels);
}

template <class T>
Floats load_lanes(const typename T::Stored* from, const Lanes& l, int64_t sample_stride) {
  typename T::Stored lanes[kWidth] = {};
  with_channels(l, [&](int64_t channels) __attribute__((always_inline)) {
    for (int64_t s = 0; s < l.samples; ++s) {
      for (int64_t c = 0; c < channels; ++c) lanes[s * channels + c] = from[s * sample_stride + c];
    }
  });
  return T::load(lanes);
}

template <class T>
void store_lanes(typename T::Stored* to, Floats v, const Lanes& l, int64_t sample_stride) {
  typename T::Stored lanes[kWidth];
  T::store(lanes, v);
  with_channels(l, [&](int64_t channels) __attribute__((always_inline)) {
    for (int64_t s = 0; s < l.samples; ++s) {
      for (int64_t c = 0; c < channels; ++c) to[s * sample_stride + c] = lanes[s * channels + c];
    }
  });
}

// How far ahead tensors are fetched, for the processor's own prefetcher does not follow a vector's channels from pixel
// to pixel: to the next row, so that a row's arithmetic lies in between. The convolution takes up to half as long with
// it where tensors leave the cache.
int64_t ahead(const DepthwiseShape& s) { return most(s.w, 16) * s.c; }

// Whether a tensor comes from memory rather than from a cache that holds what was computed before.
template <class T>
bool from_memory(const DepthwiseShape& s) {
  return s.n * s.h * s.w * s.c * static_cast<int64_t>(sizeof(typename T::Stored)) > (8 << 20);
}

// ---- a band in scratch memory ------------------------------------------------------------------------------------

// to[row - first][column][lane], rows first <= row < last, with `left` zero columns before the image's and zeros
// after them up to `stride` columns.
template <class T>
void copy_rows(const void* tensor, const DepthwiseShape& s, const Lanes& l, int64_t first, int64_t last, int64_t left,
               int64_t stride, float* to) {
  const int64_t sample_stride = s.h * s.w * s.c;
  const auto* from = static_cast<const typename T::Stored*>(tensor) + l.sample * sample_stride +
                     first * s.w * s.c + l.channel;
  // Memory is faster in one run: the first block fetches for those after it, which find it in the second-level cache.
  // [64, 64, 32, 32] at k = 3 takes 0.8 of the time with that, but tensors that are in a cache take 1.05.
  const bool fetch_pixels = from_memory<T>(s) && l.channel == 0;
  for (int64_t row = first; row < last; ++row, to += stride * kWidth) {
    for (int64_t i = 0; i < left; ++i) store(to + i * kWidth, Floats{});
    for (int64_t i = left + s.w; i < stride; ++i) store(to + i * kWidth, Floats{});
    float* at = to + left * kWidth;
    if (full(l)) {
      for (int64_t i = 0; i < s.w; ++i, at += kWidth, from += s.c) {
        const auto* const next = from + ahead(s);
        __builtin_prefetch(next);
        for (int64_t c = fetch_pixels ? kWidth : s.c; c < s.c; c += kWidth) __builtin_prefetch(next + c, 0, 2);
        store(at, T::load(from));
      }
    } else {
      for (int64_t i = 0; i < s.w; ++i, at += kWidth, from += s.c) store(at, load_lanes<T>(from, l, sample_stride));
    }
  }
}

// The rows of an image that a piece's output rows first <= row < last read, and how wide they lie in scratch memory.
struct Band {
  int64_t first, last;      // of the output
  int64_t x_first, x_last;  // of x: the band and k / 2 rows around it, as far as there are any
  int64_t width, x_width;   // columns in scratch memory, of the output and of x

  Band(const DepthwiseShape& s, int64_t index)
      : first(index * rows_a_piece(s)),
        last(least(s.h, first + rows_a_piece(s))),
        x_first(most(0, first - s.k / 2)),
        x_last(least(s.h, last + s.k / 2)),
        width(rounded_up(s.w, kTile)),
        x_width(width + s.k - 1) {}

  // Where a row of x, or of the output, begins in scratch memory.
  int64_t x_row(int64_t row) const { return (row - x_first) * x_width * kWidth; }
  int64_t out_row(int64_t row) const { return (row - first) * width * kWidth; }
};

}  // namespace
}  // namespace raccgan
