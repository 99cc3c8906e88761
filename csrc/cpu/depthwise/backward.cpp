// The backward pass of ops/depthwise.h.
#include "task.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
struct Sums {
  Floats q{}, qz{};
};

// q = [a > 0] L^T g, and its sums.
Sums pass_back(const Task& a, const Norm& norm, const Plane& h, const Plane& g, const Plane& q, float* row) {
  Sums sums;
  for (int64_t i = 0; i < h.rows; ++i) {
    a.convolution.transposed_row(g, i, h.columns, a.transposed_weights(), row);
    const float* const in = h.at(i, 0);
    float* const out = q.at(i, 0);
    Floats row_q{}, row_qz{};
    for (int64_t j = 0; j < h.columns; ++j) {
      const Floats hv = load(in + j * kWidth), v = a.passed(norm, hv, load(row + j * kWidth));
      store(out + j * kWidth, v);
      row_q += v;
      row_qz = multiply_add(v, norm.normalised(hv), row_qz);
    }
    sums.q += row_q;
    sums.qz += row_qz;
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
}  // namespace

void depthwise_backward(const DepthwiseBackwardArgs& args) {
  run_gradients(args, 3, RACCGAN_OF_DTYPE(args.layer.dtype, backward_task));
}
}  // namespace raccgan::RACCGAN_TARGET
