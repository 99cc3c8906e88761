// Vectors of a tensor [N, H, W, C], and planes of such vectors in scratch memory.
//
// A vector's lanes are channels; where a tensor has fewer channels than a vector has lanes, other samples fill the
// rest.
#pragma once

#include "../../ops/dtype.h"
#include "runs.h"

namespace raccgan {
namespace RACCGAN_TARGET {
// Rows of vectors. The columns left of column 0 and right of the last one are zero and stay zero: whoever fills a plane
// writes its own columns only.
struct Plane {
  float* data;  // of row 0, column 0
  int64_t rows, columns;
  int64_t stride;  // from row to row, in vectors

  float* at(int64_t row, int64_t column) const { return data + (row * stride + column) * kWidth; }
};
}  // namespace RACCGAN_TARGET

namespace {
using RACCGAN_TARGET::Plane;

// Lane s * channels + c holds channel `channel` + c of sample `sample` + s.
struct Lanes {
  int64_t sample, channel, samples, channels;
};

inline int64_t channel_blocks(int64_t c) { return rounded_up(c, kWidth) / kWidth; }
inline int64_t samples_a_vector(int64_t c) { return c < kWidth ? kWidth / c : 1; }

// The block of channels, and the samples from `sample` on but before `end`.
inline Lanes lanes_of(int64_t c, int64_t block, int64_t sample, int64_t end) {
  const int64_t channel = block * kWidth;
  return {sample, channel, least(samples_a_vector(c), end - sample), least(least(c, kWidth), c - channel)};
}

inline bool full(const Lanes& l) { return l.channels == kWidth; }

// use(channels), where the usual few channels of an image are a constant, so that loops over them unroll.
template <class Use> inline RACCGAN_INLINE void with_channels(const Lanes& l, const Use& use) {
  if (l.channels == 1) return use(1);
  if (l.channels == 3) return use(3);
  use(l.channels);
}

// The vector at `from`, which points at the first lane; free lanes are zero.
template <class T> Floats load_lanes(const typename T::Stored* from, const Lanes& l, int64_t sample_stride) {
  if (l.samples == 1) return Rest{l.channels}.load<T>(from);
  typename T::Stored lanes[kWidth] = {};
  with_channels(l, [&](int64_t channels) RACCGAN_INLINE {
    for (int64_t s = 0; s < l.samples; ++s) {
      for (int64_t c = 0; c < channels; ++c) lanes[s * channels + c] = from[s * sample_stride + c];
    }
  });
  return T::load(lanes);
}

template <class T> void store_lanes(typename T::Stored* to, Floats v, const Lanes& l, int64_t sample_stride) {
  if (l.samples == 1) return Rest{l.channels}.store<T>(to, v);
  typename T::Stored lanes[kWidth];
  T::store(lanes, v);
  with_channels(l, [&](int64_t channels) RACCGAN_INLINE {
    for (int64_t s = 0; s < l.samples; ++s) {
      for (int64_t c = 0; c < channels; ++c) to[s * sample_stride + c] = lanes[s * channels + c];
    }
  });
}

// One number a lane, of a float32 tensor [N, C].
inline Floats load_parameter(const float* from, const Lanes& l, int64_t c) {
  from += l.sample * c + l.channel;
  return full(l) ? load(from) : load_lanes<Float32>(from, l, c);
}

inline void store_parameter(float* to, Floats v, const Lanes& l, int64_t c) {
  to += l.sample * c + l.channel;
  full(l) ? store(to, v) : store_lanes<Float32>(to, v, l, c);
}

constexpr int64_t kBorder = 4;  // columns of zeros at either side: half a kernel of 7, and the end of the last tile
constexpr int64_t kTile = 4;    // outputs along a row whose sums stay in registers, at least

inline int64_t plane_stride(int64_t columns) { return kBorder + rounded_up(columns, 2 * kTile) + kBorder; }
inline int64_t plane_floats(int64_t rows, int64_t columns) { return rows * plane_stride(columns) * kWidth; }

// A plane in `scratch`, which is zero there, and moves on behind it.
inline Plane take_plane(float*& scratch, int64_t rows, int64_t columns) {
  const Plane plane{scratch + kBorder * kWidth, rows, columns, plane_stride(columns)};
  scratch += plane_floats(rows, columns);
  return plane;
}

// One vector's lanes of a tensor [N, rows, columns, c]: at(row, column) is its first lane.
template <class T> struct View {
  typename T::Stored* data;
  int64_t columns, c;
  int64_t sample_stride;
  const Lanes& lanes;

  View(const void* tensor, int64_t rows, int64_t columns, int64_t c, const Lanes& lanes)
      : columns(columns), c(c), sample_stride(rows * columns * c), lanes(lanes) {
    data = const_cast<typename T::Stored*>(static_cast<const typename T::Stored*>(tensor)) +
           lanes.sample * sample_stride + lanes.channel;
  }

  // Roughly the mean: of a few pixels far apart. Sums of distances from this center cancel little.
  Floats center(int64_t rows) const {
    constexpr int64_t kPixels = 8;
    const int64_t pixels = rows * columns;
    Floats sum{};
    for (int64_t i = 0; i < kPixels; ++i) {
      const auto* const from = data + (2 * i + 1) * pixels / (2 * kPixels) * c;
      sum += full(lanes) ? T::load(from) : load_lanes<T>(from, lanes, sample_stride);
    }
    return sum / static_cast<float>(kPixels);
  }

  // use(column, vector) for each column of a row. The processor does not prefetch one vector of channels from pixel to
  // pixel by itself, so the row after this one is prefetched here.
  template <class Use> inline RACCGAN_INLINE void read(int64_t row, const Use& use) const {
    const auto* from = data + row * columns * c;
    if (full(lanes)) {
      const int64_t ahead = most(columns, 16) * c;
      for (int64_t i = 0; i < columns; ++i, from += c) {
        __builtin_prefetch(from + ahead);
        use(i, T::load(from));
      }
    } else {
      for (int64_t i = 0; i < columns; ++i, from += c) use(i, load_lanes<T>(from, lanes, sample_stride));
    }
  }

  // Column i of a row becomes of(i).
  template <class Of> inline RACCGAN_INLINE void write(int64_t row, const Of& of) const {
    auto* to = data + row * columns * c;
    if (full(lanes)) {
      for (int64_t i = 0; i < columns; ++i, to += c) T::store(to, of(i));
    } else {
      for (int64_t i = 0; i < columns; ++i, to += c) store_lanes<T>(to, of(i), lanes, sample_stride);
    }
  }
};
}  // namespace
}  // namespace raccgan
