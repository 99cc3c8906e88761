// The bindings of the depthwise half of a depthwise-separable convolution, and of its two derivatives.
#include <tuple>

#include "../cpu/depthwise_separable.h"
#include "depthwise_separable.h"
#include "pointwise.h"

namespace raccgan {
namespace {

AlignedFloats zeros(int64_t count) {
  AlignedFloats memory = aligned_floats(count);
  std::fill_n(memory.get(), count, 0.0f);
  return memory;
}

struct Call : DepthwiseCall<DepthwiseLayer> {
  AlignedFloats packed;

  template <class... Others>
  explicit Call(const Tensor& x_in, const Others&... others) : DepthwiseCall(float32_or_bfloat16(x_in), others...) {
    if (x.numel() == 0) return;
    packed = aligned_floats(RACCGAN_SELECT(packed_floats)(layer));
    RACCGAN_SELECT(pack_weights)(layer, w.const_data_ptr<float>(), packed.get());
  }

  // The same layer for samples first <= n < first + count alone.
  DepthwiseLayer samples(int64_t first, int64_t count) const {
    DepthwiseLayer some = layer;
    some.n = count;
    if (some.scale != nullptr) some.scale += first * some.c, some.shift += first * some.c;
    return some;
  }

  // Runs pass(scratch, begin, end) over the tasks, with so many floats of scratch memory for each thread.
  template <class Pass>
  void run(int64_t floats, const Pass& pass) const {
    const int64_t tasks = RACCGAN_SELECT(tasks)(layer);
    share_out(tasks, x.numel() / tasks * layer.k, [&](int64_t begin, int64_t end) {
      pass(zeros(floats).get(), begin, end);
    });
  }

  // run, with what the pieces add to the gradient of w, where that is wanted; returns that gradient.
  template <class Pass>
  Tensor run_with_weights(bool want_w, int64_t floats, const Pass& pass) const {
    if (!want_w) {
      run(floats, [&](float* scratch, int64_t begin, int64_t end) { pass(nullptr, scratch, begin, end); });
      return new_weights(false);
    }
    const int64_t size = layer.k * layer.k, c = layer.c;
    const auto partial = aligned_floats(pieces(layer) * size * c);
    run(floats, [&](float* scratch, int64_t begin, int64_t end) { pass(partial.get(), scratch, begin, end); });
    const Tensor sum = new_weights(true);
    float* const to = sum.mutable_data_ptr<float>();
    std::vector<float> by_tap(size * c);
    add_up(partial.get(), pieces(layer), size * c, by_tap.data());
    for (int64_t i = 0; i < size * c; ++i) to[i % c * size + i / c] = by_tap[i];
    return sum;
  }
};

Tensor convolve(const Call& call, const std::optional<Tensor>& bias) {
  const Tensor y = call.new_y(true);
  if (y.numel() == 0) return y;
  const ForwardArgs args{call.layer, call.x.const_data_ptr(), call.packed.get(),
                         bias ? bias->const_data_ptr<float>() : nullptr, y.mutable_data_ptr()};
  const auto forward = RACCGAN_SELECT(forward);
  call.run(RACCGAN_SELECT(forward_scratch)(call.layer),
           [&](float* scratch, int64_t begin, int64_t end) { forward(args, scratch, begin, end); });
  return y;
}

Tensor depthwise_cpu(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first,
                     bool normalise, bool rectify, double eps) {
  return convolve(Call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps), std::nullopt);
}

// Samples that fill a vector of a depthwise pass, for any target.
int64_t samples_together(const DepthwiseLayer& layer) {
  return layer.c < kMostLanes ? kMostLanes / layer.c : 1;
}

// Whether each thread is to take whole samples through both convolutions. A few pixels are in the cache anyhow, and
// packing wants some rows to pay; and threads must have about the same number of samples. Either way has the same bits.
bool by_samples(const DepthwiseLayer& layer) {
  if (layer.c == 0 || layer.out(layer.h) * layer.out(layer.w) < kRowsATask) return false;
  const int64_t groups = layer.n / samples_together(layer), threads = torch::stable::get_num_threads();
  return groups > 1 && (groups % threads == 0 || groups >= 4 * threads);
}

// What the depthwise convolution makes of some samples is the left operand of the product while it is in the cache.
Tensor convolve_by_samples(const Call& call, const std::optional<Tensor>& bias, PointwiseCall pointwise) {
  const DepthwiseLayer& layer = call.layer;
  const int64_t together = samples_together(layer), groups = rounded_up(layer.n, together) / together;
  const int64_t pixels = layer.out(layer.h) * layer.out(layer.w), size = size_of(layer.dtype);
  const auto forward = RACCGAN_SELECT(forward);
  const auto tasks = RACCGAN_SELECT(tasks);
  const char* const x = static_cast<const char*>(call.x.const_data_ptr());
  pointwise.pack();
  share_out(groups, call.x.numel() / groups * layer.k, [&](int64_t begin, int64_t end) {
    const AlignedFloats scratch = zeros(RACCGAN_SELECT(forward_scratch)(layer));
    const AlignedFloats u = aligned_floats(rounded_up(together * pixels * layer.c * size, 4) / 4);
    const AlignedFloats product_scratch = aligned_floats(RACCGAN_SELECT(product_scratch)(pointwise.args));
    for (int64_t first = begin * together; first < least(layer.n, end * together); first += together) {
      const DepthwiseLayer some = call.samples(first, least(together, layer.n - first));
      const void* const from = x + first * layer.h * layer.w * layer.c * size;
      forward({some, from, call.packed.get(), bias ? bias->const_data_ptr<float>() : nullptr, u.get()},
              scratch.get(), 0, tasks(some));
      pointwise.rows(first * pixels, some.n * pixels, u.get(), product_scratch.get());
    }
  });
  return pointwise.y;
}

Tensor depthwise_separable_cpu(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias_in,
                               const Tensor& pointwise, const std::optional<Tensor>& pointwise_bias,
                               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                               const std::optional<Tensor>& residual, const std::optional<Tensor>& packed,
                               int64_t upsample, int64_t pool, bool rectify_first, bool normalise, bool rectify,
                               double eps) {
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  std::optional<Tensor> bias;
  if (bias_in) bias = floats(*bias_in, call.layer.c, "the depthwise bias must be float32 [C]");
  if (!by_samples(call.layer)) return pointwise_cpu(convolve(call, bias), pointwise, pointwise_bias, residual, packed);
  const int64_t rows = call.layer.out(call.layer.h), columns = call.layer.out(call.layer.w);
  return convolve_by_samples(
      call, bias, {call.x, call.layer.c, rows, columns, pointwise, pointwise_bias, residual, packed});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_backward_cpu(
    const Tensor& g_in, const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
    bool rectify, double eps, bool want_x, bool want_w, bool want_affine) {
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor g = call.like_y(g_in, "g");
  const Tensor grad_x = call.new_x(want_x);
  const Tensor grad_scale = call.new_parameter(want_affine), grad_shift = call.new_parameter(want_affine);
  if (call.x.numel() == 0) return {grad_x, call.zero_weights(want_w), grad_scale, grad_shift};
  const BackwardArgs args{call.layer, g.const_data_ptr(), call.x.const_data_ptr(), call.packed.get(),
                          data_of(grad_x, want_x), nullptr, floats_of(grad_scale, want_affine),
                          floats_of(grad_shift, want_affine)};
  const auto backward = RACCGAN_SELECT(backward);
  const int64_t floats = RACCGAN_SELECT(backward_scratch)(call.layer);
  const auto run = [&](float* partial, float* scratch, int64_t begin, int64_t end) {
    BackwardArgs with = args;
    with.partial_w = partial;
    backward(with, scratch, begin, end);
  };
  const Tensor grad_w = call.run_with_weights(want_w, floats, run);
  return {grad_x, grad_w, grad_scale, grad_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_double_backward_cpu(
    const Tensor& t_in, const Tensor& g_in, const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
    bool rectify, double eps, bool want_g, bool want_x, bool want_w, bool want_scale) {
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor t = call.like_x(t_in, "t"), g = call.like_y(g_in, "g");
  const Tensor grad_g = call.new_y(want_g), grad_x = call.new_x(want_x), grad_scale = call.new_parameter(want_scale);
  if (call.x.numel() == 0) return {grad_g, grad_x, call.zero_weights(want_w), grad_scale};
  const DoubleBackwardArgs args{call.layer, t.const_data_ptr(), g.const_data_ptr(), call.x.const_data_ptr(),
                                call.packed.get(), data_of(grad_g, want_g), data_of(grad_x, want_x), nullptr,
                                floats_of(grad_scale, want_scale)};
  const auto double_backward = RACCGAN_SELECT(double_backward);
  const int64_t floats = RACCGAN_SELECT(double_backward_scratch)(call.layer);
  const auto run = [&](float* partial, float* scratch, int64_t begin, int64_t end) {
    DoubleBackwardArgs with = args;
    with.partial_w = partial;
    double_backward(with, scratch, begin, end);
  };
  const Tensor grad_w = call.run_with_weights(want_w, floats, run);
  return {grad_g, grad_x, grad_w, grad_scale};
}

}  // namespace
}  // namespace raccgan

#define RACCGAN_LAYER                                                                                    \
  "Tensor x, Tensor w, Tensor? scale, Tensor? shift, int upsample, int pool, bool rectify_first, "      \
  "bool normalise, bool rectify, float eps"

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def("depthwise_native(" RACCGAN_LAYER ") -> Tensor");
  // All of it in one call, without gradients, on a CPU alone.
  m.def("depthwise_separable_native(Tensor x, Tensor w, Tensor? bias, Tensor pointwise, Tensor? pointwise_bias, "
        "Tensor? scale, Tensor? shift, Tensor? residual, Tensor? packed, int upsample, int pool, bool rectify_first, "
        "bool normalise, bool rectify, float eps) -> Tensor");
  // All of it in one kernel, on a GPU alone: y and, where they are wanted, its sum, sum of squares and max.
  m.def("depthwise_native_fused(Tensor x, Tensor w, Tensor pointwise, Tensor? bias, Tensor? scale, Tensor? shift, "
        "Tensor? residual, int upsample, int pool, bool rectify_first, bool normalise, bool rectify, float eps, "
        "bool tf32, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise_native_backward(Tensor g, " RACCGAN_LAYER
        ", bool want_x, bool want_w, bool want_affine) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise_native_double_backward(Tensor t, Tensor g, " RACCGAN_LAYER
        ", bool want_g, bool want_x, bool want_w, bool want_scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise_cpu));
  m.impl("depthwise_separable_native", TORCH_BOX(&raccgan::depthwise_separable_cpu));
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward_cpu));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward_cpu));
}
