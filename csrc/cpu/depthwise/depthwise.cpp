// The three passes of depthwise_separable.h. All of it but the matrix product is a function of one sample's channel, so
// a task takes one vector of channels through the whole chain, on planes that stay in the cache: each tensor is read
// once and each result written once.
//
// With P u = u - mean(u) - z mean(u z) and r = 1 / sqrt(var + eps), over the pixels of a channel:
//
//     forward          y = L a,  a = relu(z scale + shift)
//     backward         q' = [a > 0] L^T g,  grad_x = r scale P q',  grad_shift = sum q',  grad_scale = sum q' z,
//                      grad_w = a correlated with g
//     double backward  u = r P t,  q = scale q',  s = scale [a > 0] u
//                      grad_g = L s,  grad_w = s correlated with g,  grad_scale = sum q' u,
//                      grad_x = -r^2 (A z + mean(q z) P t + mean(t z) P q),
//                      A = mean(t q) - mean(t) mean(q) - mean(t z) mean(q z)
//
// Without the norm, r = 1, P u = u and the double backward's grad_x is zero. A ReLU before the norm multiplies t, and
// what leaves as grad_x, by [x > 0].
#include "depthwise.h"

#include <math.h>

#include "rows.h"

namespace raccgan {
namespace {

// ---- the convolution by kernel size and resizing ------------------------------------------------------------------

using Row = void (*)(const Plane& x, int64_t h, int64_t columns, const float* weights, float* row);
using Correlate = void (*)(const Plane& x, const Plane& y, float* totals);

struct Convolution {
  Row row, transposed_row;
  Correlate correlate;  // of the larger plane with the smaller one
};

template <int K>
Convolution convolution_of(Resize resize) {
  if (resize == Resize::kUp) return {up_row<K>, down_row<K>, correlate<K, 2>};
  if (resize == Resize::kDown) return {down_row<K>, up_row<K>, correlate<K, 2>};
  return {plain_row<K>, plain_row<K>, correlate<K, 1>};
}

Convolution convolution_of(const DepthwiseLayer& s) {
  return s.k == 3 ? convolution_of<3>(s.resize) : s.k == 5 ? convolution_of<5>(s.resize) : convolution_of<7>(s.resize);
}

// Taps a side: of w, or of w summed over 2 x 2 neighbours, which is the convolution together with its resizing.
int64_t taps(const DepthwiseLayer& s) { return s.resize == Resize::kPlain ? s.k : s.k + 1; }

// One block of channels: what `row` takes, then what `transposed_row` takes.
int64_t packed_block(const DepthwiseLayer& s) { return 2 * taps(s) * taps(s) * kWidth; }

// Reorders v [k + 1][k + 1] by output parity, as up_row takes it.
void pack_up(const Floats* v, int64_t k, float* to) {
  const int64_t half = (k + 1) / 2;
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      for (int64_t t = 0; t < half; ++t) {
        for (int64_t u = 0; u < half; ++u, to += kWidth) {
          store(to, v[(last_tap(k, row) - 2 * t) * (k + 1) + last_tap(k, column) - 2 * u]);
        }
      }
    }
  }
}

void pack_block(const DepthwiseLayer& s, const float* w, const Lanes& l, float* to) {
  const int64_t k = s.k, size = k * k, n = taps(s);
  Floats plain[49], v[64];
  for_lanes(size, [&](auto lanes, int64_t i) RACCGAN_INLINE {
    Floats tile[kWidth] = {};
    for (int64_t lane = 0; lane < l.samples * l.channels; ++lane) {
      tile[lane] = lanes.template load<Float32>(w + (l.channel + lane % l.channels) * size + i);
    }
    transpose(tile);
    memcpy(plain + i, tile, least(kWidth, size - i) * sizeof *tile);
  });
  float* const transposed = to + n * n * kWidth;
  if (s.resize == Resize::kPlain) {
    for (int64_t i = 0; i < size; ++i) store(to + i * kWidth, plain[i]);
    for (int64_t i = 0; i < size; ++i) store(transposed + i * kWidth, plain[size - 1 - i]);
    return;
  }
  const bool up = s.resize == Resize::kUp;  // is the transpose of down by the flipped kernel
  for (int64_t i = 0; i < n * n; ++i) {
    const int64_t a = i / n, b = i % n;
    v[i] = Floats{};
    for (int64_t r = most(0, a - k + 1); r <= least(1, a); ++r) {
      for (int64_t c = most(0, b - k + 1); c <= least(1, b); ++c) {
        const int64_t at = (a - r) * k + b - c;
        v[i] += plain[up ? size - 1 - at : at];
      }
    }
    if (!up) v[i] *= 0.25f;
  }
  pack_up(v, k, up ? to : transposed);
  float* const down = up ? transposed : to;
  for (int64_t i = 0; i < n * n; ++i) store(down + i * kWidth, v[i]);
}

// totals [taps][taps] of a block, summed over its samples, as what they add to the gradient of w: partial[i, c].
void write_partial(const float* totals, const DepthwiseLayer& s, int64_t block, float* partial) {
  const Lanes l = lanes_of(s.c, block, 0, samples_a_vector(s.c));
  const int64_t k = s.k, n = taps(s);
  for (int64_t i = 0; i < k * k; ++i) {
    Floats sum{};
    if (s.resize == Resize::kPlain) {
      sum = load(totals + i * kWidth);
    } else {
      const int64_t at = s.resize == Resize::kUp ? k * k - 1 - i : i;
      for (int64_t r = 0; r < 2; ++r) {
        for (int64_t c = 0; c < 2; ++c) sum += load(totals + ((at / k + r) * n + at % k + c) * kWidth);
      }
      if (s.resize == Resize::kDown) sum *= 0.25f;
    }
    float lanes[kWidth];
    store(lanes, sum);
    for (int64_t c = 0; c < l.channels; ++c) {
      float over_samples = 0;
      for (int64_t sample = 0; sample < l.samples; ++sample) over_samples += lanes[sample * l.channels + c];
      partial[i * s.c + l.channel + c] = over_samples;
    }
  }
}

// ---- the norm and the activation ----------------------------------------------------------------------------------

Floats broadcast(float v) { return Floats{} + v; }

// PyTorch's ReLU: NaN stays NaN.
Floats relu(Floats v) { return Floats{} > v ? Floats{} : v; }

Floats positive(Floats v, Floats otherwise_zero) { return v > Floats{} ? otherwise_zero : Floats{}; }

Floats inverse_root(Floats v) {
  float lanes[kWidth];
  store(lanes, v);
  for (float& lane : lanes) lane = 1 / sqrtf(lane);
  return load(lanes);
}

// One vector's channels: z = (h - mean) * root, a = relu((h - mean) * slope + shift). With the mean in an offset instead
// a constant channel of large numbers would leave that offset's rounding, times 1 / sqrt(eps).
struct Norm {
  Floats mean, root, scale, slope, shift;
};

// What a task works with.
struct Worker {
  const DepthwiseLayer& s;
  const Convolution convolution;
  const Lanes& l;
  const float* weights;  // of this block
  float* scratch;

  const float* transposed_weights() const { return weights + packed_block(s) / 2; }
  float pixels() const { return static_cast<float>(s.h * s.w); }
  Floats activated(const Norm& norm, Floats h) const {
    const Floats v = multiply_add(h - norm.mean, norm.slope, norm.shift);
    return s.rectify ? relu(v) : v;
  }
  // `v` where the activation passes it on.
  Floats passed(const Norm& norm, Floats h, Floats v) const {
    return s.rectify ? positive(multiply_add(h - norm.mean, norm.slope, norm.shift), v) : v;
  }
};

Norm finish(const Worker& a, Floats mean, Floats root) {
  const DepthwiseLayer& s = a.s;
  const Floats scale = s.scale ? load_parameter(s.scale, a.l, s.c) : broadcast(1);
  const Floats shift = s.shift ? load_parameter(s.shift, a.l, s.c) : Floats{};
  return {mean, root, scale, root * scale, shift};
}

// Copies x, rectified if so, to `h`, and returns its norm. Sums are of the distance from a pivot, row by row: a variance
// from sums of squares would cancel where the mean is large.
template <class T>
Norm read_normalised(const Worker& a, const void* x, const Plane& h) {
  const View<T> view(x, h.rows, h.columns, a.s.c, a.l);
  const Floats at = view.pivot(h.rows), pivot = a.s.rectify_first ? relu(at) : at;
  Floats sum{}, squares{};
  for (int64_t row = 0; row < h.rows; ++row) {
    Floats row_sum{}, row_squares{};
    float* const to = h.at(row, 0);
    view.read(row, [&](int64_t i, Floats v) __attribute__((always_inline)) {
      if (a.s.rectify_first) v = relu(v);
      store(to + i * kWidth, v);
      const Floats d = v - pivot;
      row_sum += d;
      row_squares = multiply_add(d, d, row_squares);
    });
    sum += row_sum;
    squares += row_squares;
  }
  if (!a.s.normalise) return finish(a, Floats{}, broadcast(1));
  const Floats mean = sum / a.pixels();
  const Floats var = relu(squares / a.pixels() - mean * mean);
  return finish(a, pivot + mean, inverse_root(var + a.s.eps));
}

template <class T>
void read_plane(const void* tensor, const Plane& to, const Worker& a) {
  const View<T> view(tensor, to.rows, to.columns, a.s.c, a.l);
  for (int64_t row = 0; row < to.rows; ++row) {
    float* const at = to.at(row, 0);
    view.read(row, [&](int64_t i, Floats v) __attribute__((always_inline)) { store(at + i * kWidth, v); });
  }
}

// to = of(from), number by number.
template <class Of>
inline __attribute__((always_inline)) void map_plane(const Plane& from, const Plane& to, const Of& of) {
  for (int64_t row = 0; row < from.rows; ++row) {
    const float* in = from.at(row, 0);
    float* out = to.at(row, 0);
    for (int64_t i = 0; i < from.columns; ++i) store(out + i * kWidth, of(load(in + i * kWidth)));
  }
}

// Some rows of y, first <= row < last, and of x what they are made of: if its row `from` were row 0, y's row h would be
// row h - shift.
struct Band {
  int64_t first, last, from, until, shift;
};

Band band_of(const DepthwiseLayer& s, int64_t first, int64_t last) {
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

// tensor = L from + bias, for a band.
template <class T>
void write_convolved(const Worker& a, const Band& band, const Plane& from, Floats bias, void* tensor, float* row) {
  const int64_t columns = a.s.out(a.s.w);
  const View<T> view(tensor, band.last - band.first, columns, a.s.c, a.l);
  for (int64_t h = band.first; h < band.last; ++h) {
    a.convolution.row(from, h - band.shift, columns, a.weights, row);
    view.write(h - band.first, [&](int64_t i) __attribute__((always_inline)) { return load(row + i * kWidth) + bias; });
  }
}

// totals += the correlation that is the gradient of w for L's input `in` and the gradient `out` of its result.
void correlate_planes(const Worker& a, const Plane& in, const Plane& out, float* totals) {
  a.s.resize == Resize::kUp ? a.convolution.correlate(out, in, totals) : a.convolution.correlate(in, out, totals);
}

// ---- the passes ----------------------------------------------------------------------------------------------------

int64_t totals_floats(const DepthwiseLayer& s) { return taps(s) * taps(s) * kWidth; }

// One row of the widest tensor, with room for what fills up its last tile.
int64_t row_floats(const DepthwiseLayer& s) { return 2 * (most(s.w, s.out(s.w)) + 2 * kTile) * kWidth; }

// A row and so many planes of some of x's rows. The last tile of the last plane may read on.
int64_t scratch_floats(const DepthwiseLayer& s, int64_t planes, int64_t rows) {
  return row_floats(s) + planes * plane_floats(rows, s.w) + 2 * kBorder * kWidth;
}

// The same with a plane like y, and totals.
int64_t gradient_scratch_floats(const DepthwiseLayer& s, int64_t planes) {
  return totals_floats(s) + scratch_floats(s, planes, s.h) + plane_floats(s.out(s.h), s.out(s.w));
}

template <class T>
void forward_lanes(const ForwardArgs& args, const Worker& a) {
  const DepthwiseLayer& s = a.s;
  float *const row = a.scratch, *scratch = row + row_floats(s);
  const Band band = band_of(s, args.first, args.last);
  const Plane activated = take_plane(scratch, band.until - band.from, s.w);
  // Without a norm the activation needs no look at the whole plane first.
  const Norm norm = s.normalise ? read_normalised<T>(a, args.x, activated) : finish(a, Floats{}, broadcast(1));
  if (s.normalise) {
    map_plane(activated, activated, [&](Floats h) __attribute__((always_inline)) { return a.activated(norm, h); });
  } else {
    const View<T> view(args.x, s.h, s.w, s.c, a.l);
    for (int64_t h = band.from; h < band.until; ++h) {
      float* const to = activated.at(h - band.from, 0);
      view.read(h, [&](int64_t i, Floats v) __attribute__((always_inline)) {
        store(to + i * kWidth, a.activated(norm, s.rectify_first ? relu(v) : v));
      });
    }
  }
  const float* const bias = args.bias == nullptr ? nullptr : args.bias + a.l.channel;
  write_convolved<T>(a, band, activated, bias ? load_lanes<Float32>(bias, a.l, 0) : Floats{}, args.y, row);
}

template <class T>
void backward_lanes(const BackwardArgs& args, const Worker& a, float* totals) {
  const DepthwiseLayer& s = a.s;
  float *const row = a.scratch, *scratch = row + row_floats(s);
  const Plane h = take_plane(scratch, s.h, s.w), g = take_plane(scratch, s.out(s.h), s.out(s.w));
  const Norm norm = read_normalised<T>(a, args.x, h);
  read_plane<T>(args.g, g, a);
  if (args.partial_w != nullptr) {
    const Plane activated = take_plane(scratch, s.h, s.w);
    map_plane(h, activated, [&](Floats v) __attribute__((always_inline)) { return a.activated(norm, v); });
    correlate_planes(a, activated, g, totals);
  }
  if (args.grad_x == nullptr && args.grad_scale == nullptr) return;

  const Plane q = take_plane(scratch, s.h, s.w);
  Floats sum{}, sum_z{};
  for (int64_t i = 0; i < s.h; ++i) {
    a.convolution.transposed_row(g, i, s.w, a.transposed_weights(), row);
    const float* const in = h.at(i, 0);
    float* const out = q.at(i, 0);
    Floats row_sum{}, row_sum_z{};
    for (int64_t j = 0; j < s.w; ++j) {
      const Floats hv = load(in + j * kWidth), v = a.passed(norm, hv, load(row + j * kWidth));
      store(out + j * kWidth, v);
      row_sum += v;
      row_sum_z = multiply_add(v, (hv - norm.mean) * norm.root, row_sum_z);
    }
    sum += row_sum;
    sum_z += row_sum_z;
  }
  if (args.grad_scale != nullptr) {
    store_parameter(args.grad_scale, sum_z, a.l, s.c);
    store_parameter(args.grad_shift, sum, a.l, s.c);
  }
  if (args.grad_x == nullptr) return;
  const Floats mean = s.normalise ? sum / a.pixels() : Floats{}, mean_z = s.normalise ? sum_z / a.pixels() : Floats{};
  const View<T> view(args.grad_x, s.h, s.w, s.c, a.l);
  for (int64_t i = 0; i < s.h; ++i) {
    const float *const in = h.at(i, 0), *const from = q.at(i, 0);
    view.write(i, [&](int64_t j) __attribute__((always_inline)) {
      const Floats hv = load(in + j * kWidth), z = (hv - norm.mean) * norm.root;
      const Floats v = norm.slope * (load(from + j * kWidth) - mean - z * mean_z);
      return s.rectify_first ? positive(hv, v) : v;
    });
  }
}

template <class T>
void double_backward_lanes(const DoubleBackwardArgs& args, const Worker& a, float* totals) {
  const DepthwiseLayer& s = a.s;
  float *const row = a.scratch, *scratch = row + row_floats(s);
  const Plane h = take_plane(scratch, s.h, s.w), g = take_plane(scratch, s.out(s.h), s.out(s.w));
  const Plane t = take_plane(scratch, s.h, s.w), q = take_plane(scratch, s.h, s.w);
  const Plane passed = take_plane(scratch, s.h, s.w);
  const Norm norm = read_normalised<T>(a, args.x, h);
  const float count = a.pixels();
  read_plane<T>(args.g, g, a);

  const View<T> t_view(args.t, s.h, s.w, s.c, a.l);
  Floats t_sum{}, tz_sum{};
  for (int64_t i = 0; i < s.h; ++i) {
    const float* const in = h.at(i, 0);
    float* const out = t.at(i, 0);
    Floats row_t{}, row_tz{};
    t_view.read(i, [&](int64_t j, Floats v) __attribute__((always_inline)) {
      const Floats hv = load(in + j * kWidth);
      if (s.rectify_first) v = positive(hv, v);
      store(out + j * kWidth, v);
      row_t += v;
      row_tz = multiply_add(v, (hv - norm.mean) * norm.root, row_tz);
    });
    t_sum += row_t;
    tz_sum += row_tz;
  }
  const Floats t_mean = s.normalise ? t_sum / count : Floats{}, tz_mean = s.normalise ? tz_sum / count : Floats{};

  Floats q_sum{}, qz_sum{}, tq_sum{}, scale_sum{};
  for (int64_t i = 0; i < s.h; ++i) {
    a.convolution.transposed_row(g, i, s.w, a.transposed_weights(), row);
    const float *const in = h.at(i, 0), *const t_in = t.at(i, 0);
    float *const q_out = q.at(i, 0), *const out = passed.at(i, 0);
    Floats row_q{}, row_qz{}, row_tq{}, row_scale{};
    for (int64_t j = 0; j < s.w; ++j) {
      const Floats hv = load(in + j * kWidth), tv = load(t_in + j * kWidth), z = (hv - norm.mean) * norm.root;
      const Floats u = norm.root * (tv - t_mean - z * tz_mean);
      const Floats gradient = a.passed(norm, hv, load(row + j * kWidth)), v = norm.scale * gradient;
      store(q_out + j * kWidth, v);
      store(out + j * kWidth, a.passed(norm, hv, norm.scale * u));
      row_q += v;
      row_qz = multiply_add(v, z, row_qz);
      row_tq = multiply_add(v, tv, row_tq);
      row_scale = multiply_add(gradient, u, row_scale);
    }
    q_sum += row_q;
    qz_sum += row_qz;
    tq_sum += row_tq;
    scale_sum += row_scale;
  }
  if (args.grad_g != nullptr) write_convolved<T>(a, band_of(s, 0, s.out(s.h)), passed, Floats{}, args.grad_g, row);
  if (args.partial_w != nullptr) correlate_planes(a, passed, g, totals);
  if (args.grad_scale != nullptr) store_parameter(args.grad_scale, scale_sum, a.l, s.c);
  if (args.grad_x == nullptr) return;
  const Floats q_mean = q_sum / count, qz_mean = qz_sum / count;
  const Floats curvature = tq_sum / count - t_mean * q_mean - tz_mean * qz_mean;
  const Floats factor = Floats{} - norm.root * norm.root;
  const View<T> view(args.grad_x, s.h, s.w, s.c, a.l);
  for (int64_t i = 0; i < s.h; ++i) {
    const float *const in = h.at(i, 0), *const t_in = t.at(i, 0), *const q_in = q.at(i, 0);
    view.write(i, [&](int64_t j) __attribute__((always_inline)) {
      const Floats hv = load(in + j * kWidth), z = (hv - norm.mean) * norm.root;
      const Floats pt = load(t_in + j * kWidth) - t_mean - z * tz_mean;
      const Floats pq = load(q_in + j * kWidth) - q_mean - z * qz_mean;
      const Floats v = factor * (curvature * z + qz_mean * pt + tz_mean * pq);
      return s.rectify_first ? positive(hv, v) : v;
    });
  }
}

// lanes(worker) for every vector of the tasks begin <= i < end; then done(piece, block) for each task.
template <class Each, class Done>
void run(const DepthwiseLayer& s, const float* packed, float* scratch, int64_t begin, int64_t end, const Each& each,
         const Done& done) {
  const int64_t blocks = channel_blocks(s.c);
  const Convolution convolution = convolution_of(s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % blocks, piece = task / blocks, first = piece * samples_a_piece(s);
    const int64_t last = least(s.n, first + samples_a_piece(s));
    for (int64_t n = first; n < last; n += samples_a_vector(s.c)) {
      const Lanes l = lanes_of(s.c, block, n, last);
      each(Worker{s, convolution, l, packed + block * packed_block(s), scratch});
    }
    done(piece, block);
  }
}

// The same for a pass that adds up `totals` for partial_w, where that is wanted.
template <class Each>
void run_with_totals(const DepthwiseLayer& s, const float* packed, float* partial, float* scratch, int64_t begin,
                     int64_t end, const Each& each) {
  float* const totals = scratch;
  run(
      s, packed, scratch + totals_floats(s), begin, end, [&](const Worker& a) { each(a, totals); },
      [&](int64_t piece, int64_t block) {
        if (partial == nullptr) return;
        write_partial(totals, s, block, partial + piece * s.k * s.k * s.c);
        memset(totals, 0, totals_floats(s) * sizeof(float));
      });
}

}  // namespace

namespace RACCGAN_TARGET {

int64_t packed_floats(const DepthwiseLayer& layer) { return channel_blocks(layer.c) * packed_block(layer); }

void pack_weights(const DepthwiseLayer& layer, const float* w, float* packed) {
  for (int64_t block = 0; block < channel_blocks(layer.c); ++block, packed += packed_block(layer)) {
    pack_block(layer, w, lanes_of(layer.c, block, 0, samples_a_vector(layer.c)), packed);
  }
}

int64_t tasks(const DepthwiseLayer& layer) { return pieces(layer) * channel_blocks(layer.c); }

int64_t forward_scratch(const DepthwiseLayer& layer, int64_t rows) {
  const int64_t alone = layer.resize == Resize::kDown ? 2 * rows : rows;
  return scratch_floats(layer, 1, least(layer.h, alone + layer.k + 1));
}
int64_t backward_scratch(const DepthwiseLayer& layer) { return gradient_scratch_floats(layer, 3); }
int64_t double_backward_scratch(const DepthwiseLayer& layer) { return gradient_scratch_floats(layer, 4); }

void forward(const ForwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto lanes = args.layer.dtype == Dtype::kFloat32 ? forward_lanes<Float32> : forward_lanes<BFloat16>;
  run(args.layer, args.packed, scratch, begin, end, [&](const Worker& a) { lanes(args, a); }, [](int64_t, int64_t) {});
}

void backward(const BackwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto lanes = args.layer.dtype == Dtype::kFloat32 ? backward_lanes<Float32> : backward_lanes<BFloat16>;
  run_with_totals(args.layer, args.packed, args.partial_w, scratch, begin, end,
                  [&](const Worker& a, float* totals) { lanes(args, a, totals); });
}

void double_backward(const DoubleBackwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  const bool float32 = args.layer.dtype == Dtype::kFloat32;
  const auto lanes = float32 ? double_backward_lanes<Float32> : double_backward_lanes<BFloat16>;
  run_with_totals(args.layer, args.packed, args.partial_w, scratch, begin, end,
                  [&](const Worker& a, float* totals) { lanes(args, a, totals); });
}

}  // namespace RACCGAN_TARGET
}  // namespace raccgan
