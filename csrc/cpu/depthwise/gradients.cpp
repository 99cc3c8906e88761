// The backward and the double backward pass of ops/depthwise.h.
#include "task.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
struct Sums {
  Floats q{}, qz{}, tq{}, grad_scale{};

  void operator+=(const Sums& row) {  // a row at a time, which keeps rounding small
    q += row.q, qz += row.qz;
    tq += row.tq, grad_scale += row.grad_scale;
  }
};

// q = [a > 0] L^T g, and its sums.
Sums pass_back(const Task& a, const Norm& norm, const Plane& h, const Plane& g, const Plane& q, float* row) {
  Sums sums;
  for (int64_t i = 0; i < h.rows; ++i) {
    a.convolution.transposed_row(g, i, h.columns, a.transposed_weights(), row);
    const float* const in = h.at(i, 0);
    float* const out = q.at(i, 0);
    Sums of_row;
    for (int64_t j = 0; j < h.columns; ++j) {
      const Floats hv = load(in + j * kWidth), v = a.passed(norm, hv, load(row + j * kWidth));
      store(out + j * kWidth, v);
      of_row.q += v;
      of_row.qz = multiply_add(v, norm.normalised(hv), of_row.qz);
    }
    sums += of_row;
  }
  return sums;
}

template <class T> void backward_task(const DepthwiseBackwardArgs& args, const Task& a, float* totals) {
  const DepthwiseLayer& s = a.s;
  float *const row = a.scratch, *scratch = row + row_floats(s);
  const Plane h = take_plane(scratch, s.h, s.w), g = take_plane(scratch, s.out(s.h), s.out(s.w));
  const Norm norm = read_normalised<T>(a, args.x, h);
  read_plane<T>(args.g, g, a);
  if (args.grad_w != nullptr) {
    const Plane activated = take_plane(scratch, s.h, s.w);
    map_plane(h, activated, [&](Floats v) RACCGAN_INLINE { return a.activated(norm, v); });
    correlate_planes(a, activated, g, totals);
  }
  if (args.grad_x == nullptr && args.grad_scale == nullptr) return;

  const Plane q = take_plane(scratch, s.h, s.w);
  const Sums sums = pass_back(a, norm, h, g, q, row);
  if (args.grad_scale != nullptr) {
    store_parameter(args.grad_scale, sums.qz, a.l, s.c);
    store_parameter(args.grad_shift, sums.q, a.l, s.c);
  }
  if (args.grad_x == nullptr) return;
  const Floats q_mean = a.norm_mean(sums.q), qz_mean = a.norm_mean(sums.qz);
  const View<T> view(args.grad_x, s.h, s.w, s.c, a.l);
  for (int64_t i = 0; i < s.h; ++i) {
    const float *const in = h.at(i, 0), *const from = q.at(i, 0);
    view.write(i, [&](int64_t j) RACCGAN_INLINE {
      const Floats hv = load(in + j * kWidth);
      const Floats v = norm.slope * (load(from + j * kWidth) - q_mean - norm.normalised(hv) * qz_mean);
      return s.pre_relu ? positive(hv, v) : v;
    });
  }
}

struct Planes {
  Plane h, g, t, q, s;  // q is that of ops/depthwise.h times scale
};

struct Tangent {
  Floats mean, z_mean;  // of t and of t z; zero without the norm
};

// Copies t, where the first ReLU passes x, to its plane.
template <class T> Tangent read_tangent(const Task& a, const Norm& norm, const void* tensor, const Planes& planes) {
  const View<T> view(tensor, a.s.h, a.s.w, a.s.c, a.l);
  Floats t_sum{}, tz_sum{};
  for (int64_t i = 0; i < a.s.h; ++i) {
    const float* const in = planes.h.at(i, 0);
    float* const out = planes.t.at(i, 0);
    Floats row_t{}, row_tz{};
    view.read(i, [&](int64_t j, Floats v) RACCGAN_INLINE {
      const Floats hv = load(in + j * kWidth);
      if (a.s.pre_relu) v = positive(hv, v);
      store(out + j * kWidth, v);
      row_t += v;
      row_tz = multiply_add(v, norm.normalised(hv), row_tz);
    });
    t_sum += row_t;
    tz_sum += row_tz;
  }
  return {a.norm_mean(t_sum), a.norm_mean(tz_sum)};
}

// Fills the planes of q and s. Inlined, so that norm and tangent stay in registers: stores might change a reference.
inline RACCGAN_INLINE Sums pass_back(const Task& a, const Norm& norm, const Tangent& tangent, const Planes& planes,
                                     float* row) {
  Sums sums;
  for (int64_t i = 0; i < a.s.h; ++i) {
    a.convolution.transposed_row(planes.g, i, a.s.w, a.transposed_weights(), row);
    const float *const in = planes.h.at(i, 0), *const t_in = planes.t.at(i, 0);
    float *const q_out = planes.q.at(i, 0), *const s_out = planes.s.at(i, 0);
    Sums of_row;
    for (int64_t j = 0; j < a.s.w; ++j) {
      const Floats hv = load(in + j * kWidth), tv = load(t_in + j * kWidth), z = norm.normalised(hv);
      const Floats u = norm.root * (tv - tangent.mean - z * tangent.z_mean);
      const Floats gradient = a.passed(norm, hv, load(row + j * kWidth)), v = norm.scale * gradient;
      store(q_out + j * kWidth, v);
      store(s_out + j * kWidth, a.passed(norm, hv, norm.scale * u));
      of_row.q += v;
      of_row.qz = multiply_add(v, z, of_row.qz);
      of_row.tq = multiply_add(v, tv, of_row.tq);
      of_row.grad_scale = multiply_add(gradient, u, of_row.grad_scale);
    }
    sums += of_row;
  }
  return sums;
}

template <class T>
void write_gradient(const Task& a, const Norm& norm, const Tangent& tangent, const Sums& sums, const Planes& planes,
                    void* grad_x) {
  const Floats q_mean = sums.q / a.pixels(), qz_mean = sums.qz / a.pixels();
  const Floats curvature = sums.tq / a.pixels() - tangent.mean * q_mean - tangent.z_mean * qz_mean;
  const Floats factor = Floats{} - norm.root * norm.root;
  const View<T> view(grad_x, a.s.h, a.s.w, a.s.c, a.l);
  for (int64_t i = 0; i < a.s.h; ++i) {
    const float *const in = planes.h.at(i, 0), *const t_in = planes.t.at(i, 0), *const q_in = planes.q.at(i, 0);
    view.write(i, [&](int64_t j) RACCGAN_INLINE {
      const Floats hv = load(in + j * kWidth), z = norm.normalised(hv);
      const Floats pt = load(t_in + j * kWidth) - tangent.mean - z * tangent.z_mean;
      const Floats pq = load(q_in + j * kWidth) - q_mean - z * qz_mean;
      const Floats v = factor * (curvature * z + qz_mean * pt + tangent.z_mean * pq);
      return a.s.pre_relu ? positive(hv, v) : v;
    });
  }
}

template <class T> void double_backward_task(const DepthwiseDoubleBackwardArgs& args, const Task& a, float* totals) {
  const DepthwiseLayer& s = a.s;
  float *const row = a.scratch, *scratch = row + row_floats(s);
  Planes planes;
  planes.h = take_plane(scratch, s.h, s.w), planes.g = take_plane(scratch, s.out(s.h), s.out(s.w));
  planes.t = take_plane(scratch, s.h, s.w), planes.q = take_plane(scratch, s.h, s.w);
  planes.s = take_plane(scratch, s.h, s.w);
  const Norm norm = read_normalised<T>(a, args.x, planes.h);
  read_plane<T>(args.g, planes.g, a);
  const Tangent tangent = read_tangent<T>(a, norm, args.t, planes);
  const Sums sums = pass_back(a, norm, tangent, planes, row);
  if (args.grad_g != nullptr) write_convolved<T>(a, row_range(s, 0, s.out(s.h)), planes.s, Floats{}, args.grad_g, row);
  if (args.grad_w != nullptr) correlate_planes(a, planes.s, planes.g, totals);
  if (args.grad_scale != nullptr) store_parameter(args.grad_scale, sums.grad_scale, a.l, s.c);
  if (args.grad_x != nullptr) write_gradient<T>(a, norm, tangent, sums, planes, args.grad_x);
}
}  // namespace

void depthwise_backward(const DepthwiseBackwardArgs& args) {
  run_gradients(args, 3, RACCGAN_OF_DTYPE(args.layer.dtype, backward_task));
}

void depthwise_double_backward(const DepthwiseDoubleBackwardArgs& args) {
  run_gradients(args, 4, RACCGAN_OF_DTYPE(args.layer.dtype, double_backward_task));
}
}  // namespace raccgan::RACCGAN_TARGET
