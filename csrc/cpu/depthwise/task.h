// The steps that the three depthwise passes share. All of a pass but the matrix product is a function of one sample's
// channel, so a task takes one vector of channels through the whole chain, on planes that stay in the cache: each
// tensor is read once and each result written once.
#pragma once

#include <math.h>
#include "convolution.h"

namespace raccgan::RACCGAN_TARGET { namespace {
inline Floats broadcast(float v) { return Floats{} + v; }

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
  const Floats scale = s.scale ? load_parameter(s.scale, a.l, s.c) : broadcast(1);
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
  if (!a.s.normalise) return norm_of(a, Floats{}, broadcast(1));
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

inline int64_t totals_floats(const DepthwiseLayer& s) { return taps(s) * taps(s) * kWidth; }

// One row of the widest tensor, and the end of its last tile.
inline int64_t row_floats(const DepthwiseLayer& s) { return 2 * (most(s.w, s.out(s.w)) + 2 * kTile) * kWidth; }

// A row, and planes of `rows` rows like x's. The last tile of the last plane may read beyond that plane.
inline int64_t scratch_floats(const DepthwiseLayer& s, int64_t planes, int64_t rows) {
  return row_floats(s) + planes * plane_floats(rows, s.w) + 2 * kBorder * kWidth;
}

// The same with a plane like y, and totals.
inline int64_t gradient_scratch_floats(const DepthwiseLayer& s, int64_t planes) {
  return totals_floats(s) + scratch_floats(s, planes, s.h) + plane_floats(s.out(s.h), s.out(s.w));
}

// each(task) for every vector of the tasks begin <= i < end; then done(chunk, block) for each of these.
template <class Each, class Done>
void run(const DepthwiseLayer& s, float* scratch, int64_t begin, int64_t end, const Each& each, const Done& done) {
  const int64_t blocks = channel_blocks(s.c);
  const Convolution convolution = convolution_of(s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % blocks, chunk = task / blocks, first = chunk * samples_a_chunk(s);
    const int64_t last = least(s.n, first + samples_a_chunk(s));
    for (int64_t n = first; n < last; n += samples_a_vector(s.c)) {
      const Lanes l = lanes_of(s.c, block, n, last);
      each(Task{s, convolution, l, s.weight + block * packed_block(s), scratch});
    }
    done(chunk, block);
  }
}

// The same for gradients, where each(task, totals) adds to the gradient of the packed weights. grad_w may be null.
template <class Each>
void run_gradients(const DepthwiseLayer& s, float* grad_w, float* scratch, int64_t begin, int64_t end,
                   const Each& each) {
  float* const totals = scratch;
  run(s, scratch + totals_floats(s), begin, end, [&](const Task& a) { each(a, totals); },
      [&](int64_t chunk, int64_t block) {
    if (grad_w == nullptr) return;
    unpack_totals(s, totals, block, grad_w + chunk * s.k * s.k * s.c);
    memset(totals, 0, totals_floats(s) * sizeof(float));
  });
}
}}  // namespace raccgan::RACCGAN_TARGET
