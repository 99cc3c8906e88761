// How CBAM's passes are cut into tasks, and how threads share them out, a group of samples at a time.
#pragma once

#include "../kernels.h"
#include "../threads.h"
#include "lanes.h"

namespace raccgan { namespace {
// A sample is cut into chunks of pixels, its planes into tiles of rows, by the shape alone: never by threads or
// hardware, so that a sum over chunks is always the same sum.
constexpr int64_t kMostPixels = 1024;  // of a chunk

inline int64_t pixels_per_chunk(const CbamShape& s) {
  return most(kMostLanes, least(kMostPixels, 32768 / s.c / kMostLanes * kMostLanes));
}
inline int64_t rows_per_tile(const CbamShape& s) { return least(s.h, most(8, kMostPixels / s.w)); }
inline int64_t chunks(const CbamShape& s) { return rounded_up(pixels(s), pixels_per_chunk(s)) / pixels_per_chunk(s); }
inline int64_t tiles(const CbamShape& s) { return rounded_up(s.h, rows_per_tile(s)) / rows_per_tile(s); }

// A tensor [N, P, C], or as much of it as there is: the samples from `first` on.
struct Samples {
  const void* data;
  int64_t first;
};

struct Chunk {
  int64_t task, sample, first, last;  // pixels

  Chunk(const CbamShape& s, int64_t task)
      : task(task), sample(task / chunks(s)), first(task % chunks(s) * pixels_per_chunk(s)),
        last(least(pixels(s), first + pixels_per_chunk(s))) {}

  static int64_t in_sample(const CbamShape& s) { return chunks(s); }
  static int64_t elements(const CbamShape& s) { return least(pixels_per_chunk(s), pixels(s)) * s.c; }

  int64_t count() const { return last - first; }
  template <class T> const typename T::Stored* of(const CbamShape& s, const Samples& samples) const {
    return static_cast<const typename T::Stored*>(samples.data) + in_tensor(s) - samples.first * pixels(s) * s.c;
  }
  // Where the chunk begins in a tensor [N, P, C], in one [N, P], and in the first plane of one [N, 2, P].
  int64_t in_tensor(const CbamShape& s) const { return in_plane(s) * s.c; }
  int64_t in_plane(const CbamShape& s) const { return sample * pixels(s) + first; }
  int64_t in_planes(const CbamShape& s) const { return sample * 2 * pixels(s) + first; }
};

// The spatial gates of a chunk, into memory that may be written up to a whole vector.
inline void find_gates(const CbamArgs& args, const Chunk& chunk, float* gates) {
  const CbamSpatialGate gate = spatial_gate(args, chunk.sample);
  const float* const scores = args.saved.scores + chunk.in_plane(args.shape);
  for_lanes(chunk.count(), [&](auto lanes, int64_t at)
                               RACCGAN_INLINE { lanes.store(gates + at, gated(gate, lanes.load(scores + at))); });
}

constexpr int kRows = 4;  // of a convolution's output at a time

// A tile of a plane's rows, and where the rows around it lie in scratch memory.
struct Tile {
  int64_t task, sample, first, last;  // rows
  int64_t stride;                     // of a row in scratch memory
  int64_t size;                       // of a plane there

  Tile(const CbamShape& s, int64_t task)
      : task(task), sample(task / tiles(s)), first(task % tiles(s) * rows_per_tile(s)),
        last(least(s.h, first + rows_per_tile(s))), stride(rounded_up(s.w, (s.w > kWidth ? 2 : 1) * kWidth) + s.k - 1),
        size((rounded_up(last - first, kRows) + s.k - 1) * stride) {}

  static int64_t in_sample(const CbamShape& s) { return tiles(s); }
  static int64_t elements(const CbamShape& s) { return rows_per_tile(s) * s.w * s.k; }

  int64_t count(const CbamShape& s) const { return (last - first) * s.w; }
  int64_t in_plane(const CbamShape& s) const { return (sample * s.h + first) * s.w; }
};

// Scratch memory for three planes of any tile, and for weights.
inline int64_t tile_floats(const CbamShape& s) {
  return 3 * (rounded_up(rows_per_tile(s), kRows) + s.k - 1) * (rounded_up(s.w, 2 * kWidth) + s.k - 1) + 4 * s.k * s.k;
}

// stage(task) for every Task, a Chunk or a Tile, of the samples first <= n < last.
template <class Task, class Stage>
void for_tasks(const CbamShape& s, int64_t first, int64_t last, const Stage& stage, bool backwards = false) {
  const int64_t before = first * Task::in_sample(s), count = (last - first) * Task::in_sample(s);
  share_out(count, Task::elements(s), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) stage(Task(s, before + (backwards ? begin + end - 1 - i : i)));
  });
}

template <class Stage> void for_samples(const CbamShape& s, int64_t first, int64_t last, const Stage& stage) {
  share_out(last - first, s.c * s.r, [&](int64_t begin, int64_t end) {
    for (int64_t n = first + begin; n < first + end; ++n) stage(n);
  });
}

// stage(row) for the rows of the MLP's weights: R of the first layer, then C of the second.
template <class Stage> void for_rows(const CbamShape& s, const Stage& stage) {
  share_out(s.r + s.c, s.n * least(s.r, s.c), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) stage(row);
  });
}

// to[n - to_first, p, c] = from[n, c, p]
template <class T>
void to_channels_last(const CbamShape& s, const Chunk& chunk, const void* tensor, typename T::Stored* to,
                      int64_t to_first) {
  const int64_t size = pixels(s);
  const auto* const from = static_cast<const typename T::Stored*>(tensor) + chunk.sample * size * s.c + chunk.first;
  to += chunk.in_tensor(s) - to_first * size * s.c;
  for_lanes(s.c, [&](auto rows, int64_t c) RACCGAN_INLINE {
    for_lanes(chunk.count(), [&](auto columns, int64_t p) RACCGAN_INLINE {
      Floats block[kWidth];
      const int64_t channels = least(kWidth, s.c - c), here = least(kWidth, chunk.count() - p);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) {
        const auto* const row = from + (c + least(i, channels - 1)) * size + p;
        __builtin_prefetch(row + kAhead / kMostLanes);
        block[i] = columns.template load<T>(row);
      }
      transpose(block);
      for (int64_t i = 0; i < here; ++i) rows.template store<T>(to + (p + i) * s.c + c, block[i]);
    });
  });
}

// A tensor that a pass reads: [N, P, C] in memory, or [N, C, P] if `planar`.
struct Image {
  const void* data;
  bool planar;
};

// use(images, first, last) for groups of samples that together stay in a cache from one stage to the next. Where a
// sample fits a core's own cache, each thread takes samples through all stages by itself, and none waits for another
// between two stages; else all threads share out each stage of a group. A planar image is copied group by group, each
// group to the same place: that stays in a cache, and costs no memory that the system has to hand out first.
template <class T, int kImages, class Use>
void for_groups(const CbamShape& s, const Image (&images)[kImages], const Use& use) {
  constexpr int64_t kCache = 1 << 19;  // bytes of a second-level cache
  const int64_t elements = s.c * pixels(s), bytes = kImages * elements * size_of(s.dtype), threads = thread_count();
  const bool alone = bytes <= kCache && s.n >= threads;
  const int64_t group = alone ? 1 : most(1, kCache * threads / most(1, bytes));
  const auto run = [&](int64_t begin, int64_t end) {
    Samples samples[kImages];
    int64_t planar = 0;
    for (const Image& image : images) planar += image.planar;
    const Memory<typename T::Stored> copies(planar * least(group, s.n) * elements);
    for (int64_t first = begin; first < end; first += group) {
      const int64_t last = least(end, first + group);
      typename T::Stored* to = copies;
      for (int i = 0; i < kImages; ++i) {
        samples[i] = {images[i].data, 0};
        if (!images[i].planar) continue;
        for_tasks<Chunk>(s, first, last,
                         [&](const Chunk& chunk) { to_channels_last<T>(s, chunk, images[i].data, to, first); });
        samples[i] = {to, first};
        to += least(group, s.n) * elements;
      }
      use(samples, first, last);
    }
  };
  alone ? share_out(s.n, elements, run) : run(0, s.n);
}
}}  // namespace raccgan
