// The steps that the three depthwise passes share. All of a pass but the matrix product is a function of one sample's
// channel, so a task takes one vector of channels through the whole chain, on planes that stay in the cache: each
// tensor is read once and each result written once.
#pragma once

#include <math.h>
#include "convolution.h"

namespace raccgan::RACCGAN_TARGET { namespace {
// PyTorch's ReLU: NaN stays NaN.
inline Floats rectified(Floats v) { return Floats{} > v ? Floats{} : v; }

inline Floats positive(Floats v, Floats otherwise_zero) { return v > Floats{} ? otherwise_zero : Floats{}; }

inline Floats inverse_root(Floats v) {
  float lanes[kWidth];
  store(lanes, v);
  for (float& lane : lanes) lane = 1 / sqrtf(lane);
  return load(lanes);
}

// One vector's channels: z = (h - mean) * root, a = relu((h - mean) * slope + shift). With the mean folded into shift,
// a constant channel of large numbers would keep the rounding of that shift, times 1 / sqrt(eps).
struct Norm {
  Floats mean, root, scale, slope, shift;

  Floats normalised(Floats h) const { return (h - mean) * root; }
  Floats affine(Floats h) const { return multiply_add(h - mean, slope, shift); }
};

struct Task {
  const DepthwiseLayer& s;
  const Convolution convolution;
  const Lanes& l;
  const float* weights;  // of this block
  float* scratch;

  const float* transposed_weights() const { return weights + packed_block(s) / 2; }
  float pixels() const { return static_cast<float>(s.h * s.w); }
  Floats activated(const Norm& norm, Floats h) const {
    const Floats v = norm.affine(h);
    return s.relu ? rectified(v) : v;
  }
  // `v` where the ReLU passes h.
  Floats passed(const Norm& norm, Floats h, Floats v) const { return s.relu ? positive(norm.affine(h), v) : v; }
  // The mean of what adds up to `sum`; zero without the norm.
  Floats norm_mean(Floats sum) const { return s.normalise ? sum / pixels() : Floats{}; }
};

inline Norm norm_of(const Task& a, Floats mean, Floats root) {
  const DepthwiseLayer& s = a.s;
  const Floats scale = s.scale ? load_parameter(s.scale, a.l, s.c) : all(1);
  const Floats shift = s.shift ? load_parameter(s.shift, a.l, s.c) : Floats{};
  return {mean, root, scale, root * scale, shift};
}

// Copies relu(x) or x to `h`, and returns its norm. Sums are of the distance from a center, row by row: a variance from
// sums of squares would cancel where the mean is large.
template <class T> Norm read_normalised(const Task& a, const void* x, const Plane& h) {
  const View<T> view(x, h.rows, h.columns, a.s.c, a.l);
  const Floats at = view.center(h.rows), center = a.s.pre_relu ? rectified(at) : at;
  Floats sum{}, squares{};
  for (int64_t row = 0; row < h.rows; ++row) {
    Floats row_sum{}, row_squares{};
    float* const to = h.at(row, 0);
    view.read(row, [&](int64_t i, Floats v) RACCGAN_INLINE {
      if (a.s.pre_relu) v = rectified(v);
      store(to + i * kWidth, v);
      const Floats d = v - center;
      row_sum += d;
      row_squares = multiply_add(d, d, row_squares);
    });
    sum += row_sum;
    squares += row_squares;
  }
  if (!a.s.normalise) return norm_of(a, Floats{}, all(1));
  const Floats mean = sum / a.pixels();
  const Floats var = rectified(squares / a.pixels() - mean * mean);
  return norm_of(a, center + mean, inverse_root(var + a.s.eps));
}

template <class T> void read_plane(const void* tensor, const Plane& to, const Task& a) {
  const View<T> view(tensor, to.rows, to.columns, a.s.c, a.l);
  for (int64_t row = 0; row < to.rows; ++row) {
    float* const at = to.at(row, 0);
    view.read(row, [&](int64_t i, Floats v) RACCGAN_INLINE { store(at + i * kWidth, v); });
  }
}

// to = of(from), number by number.
template <class Of> inline RACCGAN_INLINE void map_plane(const Plane& from, const Plane& to, const Of& of) {
  for (int64_t row = 0; row < from.rows; ++row) {
    const float* in = from.at(row, 0);
    float* out = to.at(row, 0);
    for (int64_t i = 0; i < from.columns; ++i) store(out + i * kWidth, of(load(in + i * kWidth)));
  }
}

// Rows first <= row < last of y, and the rows from <= row < until of x that they depend on: if x's row `from` were row
// 0, y's row h would be row h - shift.
struct RowRange {
  int64_t first, last, from, until, shift;
};

inline RowRange row_range(const DepthwiseLayer& s, int64_t first, int64_t last) {
  const int64_t p = s.k / 2;
  if (s.resize == Resize::kUp) {
    const int64_t from = most(0, first - p) / 2;
    return {first, last, from, least(s.h, (last - 1 + p) / 2 + 1), 2 * from};
  }
  if (s.resize == Resize::kDown) {
    const int64_t from = most(0, 2 * first - p) / 2 * 2;
    return {first, last, from, least(s.h, 2 * last + p), from / 2};
  }
  return {first, last, most(0, first - p), least(s.h, last + p), most(0, first - p)};
}

// tensor = L from + bias, for those rows.
template <class T>
void write_convolved(const Task& a, const RowRange& rows, const Plane& from, Floats bias, void* tensor, float* row) {
  const int64_t columns = a.s.out(a.s.w);
  const View<T> view(tensor, rows.last - rows.first, columns, a.s.c, a.l);
  for (int64_t h = rows.first; h < rows.last; ++h) {
    a.convolution.row(from, h - rows.shift, columns, a.weights, row);
    view.write(h - rows.first, [&](int64_t i) RACCGAN_INLINE { return load(row + i * kWidth) + bias; });
  }
}

// totals += the correlation that is the gradient of w for L's input `in` and the gradient `out` of its result.
inline void correlate_planes(const Task& a, const Plane& in, const Plane& out, float* totals) {
  a.s.resize == Resize::kUp ? a.convolution.correlate(out, in, totals) : a.convolution.correlate(in, out, totals);
}

// One row of the widest tensor, and the end of its last tile.
inline int64_t row_floats(const DepthwiseLayer& s) { return 2 * (most(s.w, s.out(s.w)) + 2 * kTile) * kWidth; }

// A row, and planes of `rows` rows like x's. The last tile of the last plane may read beyond that plane.
inline int64_t scratch_floats(const DepthwiseLayer& s, int64_t planes, int64_t rows) {
  return row_floats(s) + planes * plane_floats(rows, s.w) + 2 * kBorder * kWidth;
}

// Chunks are samples, by the shape alone, never by threads or hardware, so that a sum over chunks is always the same
// sum.
inline int64_t samples_a_chunk(const DepthwiseLayer& s) {
  return most(1024 / most(1, s.h * s.w), s.c < kMostLanes ? kMostLanes : 1);
}
inline int64_t sample_chunks(const DepthwiseLayer& s) {
  return rounded_up(s.n, samples_a_chunk(s)) / samples_a_chunk(s);
}

// each(task) for every vector of a chunk's block of channels. scratch is zero.
template <class Each>
void for_samples(const DepthwiseLayer& s, int64_t chunk, int64_t block, float* scratch, const Each& each) {
  const int64_t first = chunk * samples_a_chunk(s), last = least(s.n, first + samples_a_chunk(s));
  for (int64_t n = first; n < last; n += samples_a_vector(s.c)) {
    const Lanes l = lanes_of(s.c, block, n, last);
    each(Task{s, convolution_of(s), l, s.weight + block * packed_block(s), scratch});
  }
}

// use(chunk, block, scratch) for all chunks and blocks of channels; `floats` of scratch memory are zero at first.
template <class Use> void for_blocks(const DepthwiseLayer& s, int64_t floats, const Use& use) {
  const int64_t blocks = channel_blocks(s.c), count = sample_chunks(s) * blocks;
  share_out(count, s.n * s.c * s.h * s.w / count * s.k, [&](int64_t begin, int64_t end) {
    const Memory<> scratch(floats);
    memset(scratch, 0, floats * sizeof(float));
    for (int64_t i = begin; i < end; ++i) use(i / blocks, i % blocks, scratch);
  });
}

struct PackedLayer : DepthwiseLayer {
  const Memory<> packed;

  explicit PackedLayer(const DepthwiseLayer& layer)
      : DepthwiseLayer(layer), packed(channel_blocks(c) * packed_block(layer)) {
    pack_weights(layer, packed);
    weight = packed;
  }
};

// A pass over gradients, with scratch memory for `planes` planes like x's and one like y's. each(args, task, totals) adds
// to totals [taps, taps] the task's part of the gradient of the packed weights.
template <class Args>
void run_gradients(const Args& args, int64_t planes, void (*each)(const Args&, const Task&, float* totals)) {
  const PackedLayer s(args.layer);
  const int64_t size = s.k * s.k * s.c, totals_floats = taps(s) * taps(s) * kWidth;
  const int64_t floats = totals_floats + scratch_floats(s, planes, s.h) + plane_floats(s.out(s.h), s.out(s.w));
  const Memory<> partial(args.grad_w != nullptr ? sample_chunks(s) * size : 0);
  for_blocks(s, floats, [&](int64_t chunk, int64_t block, float* totals) {
    for_samples(s, chunk, block, totals + totals_floats, [&](const Task& a) { each(args, a, totals); });
    if (args.grad_w == nullptr) return;
    unpack_totals(s, totals, block, partial + chunk * size);
    memset(totals, 0, totals_floats * sizeof *totals);
  });
  if (args.grad_w != nullptr) add_up(partial, sample_chunks(s), size, args.grad_w);
}
}}  // namespace raccgan::RACCGAN_TARGET
