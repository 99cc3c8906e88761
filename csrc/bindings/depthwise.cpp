// The bindings of the depthwise half of a depthwise-separable convolution, and of its two derivatives.
#include <tuple>

#include "../cpu/depthwise/depthwise.h"
#include "depthwise.h"
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
  const int64_t rows = call.layer.out(call.layer.h);
  const ForwardArgs args{call.layer, call.x.const_data_ptr(), call.packed.get(),
                         bias ? bias->const_data_ptr<float>() : nullptr, 0, rows, y.mutable_data_ptr()};
  const auto forward = RACCGAN_SELECT(forward);
  call.run(RACCGAN_SELECT(forward_scratch)(call.layer, rows),
           [&](float* scratch, int64_t begin, int64_t end) { forward(args, scratch, begin, end); });
  return y;
}

Tensor depthwise_cpu(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first,
                     bool normalise, bool rectify, double eps) {
  return convolve(Call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps), std::nullopt);
}

// How a batch is cut into parts that threads take through both convolutions.
struct Cut {
  int64_t together;  // samples of a part: as many as fill a vector of a depthwise pass, for any target
  int64_t bands;     // of rows of y, for a part each
  int64_t parts;     // none where it does not pay
};

// Whatever the cut, the bits are the same, so that it may depend on the number of threads.
Cut cut_of(const DepthwiseLayer& layer) {
  constexpr int64_t kNear = 1 << 18;  // bytes that stay in the second-level cache, beside what makes them
  constexpr int64_t kPixels = 4 * kRowsATask;  // that pay for reading all pointwise weights
  const int64_t rows = layer.out(layer.h), columns = layer.out(layer.w), threads = torch::stable::get_num_threads();
  if (layer.n * layer.c * rows * columns == 0) return {};
  Cut cut{layer.c < kMostLanes && layer.n > 1 ? kMostLanes / layer.c : 1, 1, 0};
  const int64_t groups = rounded_up(layer.n, cut.together) / cut.together;
  if (cut.together == 1 && !layer.normalise) {  // a norm looks at all rows first
    const int64_t paying = rounded_up(kPixels, columns) / columns;
    const int64_t near = most(paying, kNear / (columns * layer.c * size_of(layer.dtype)));
    cut.bands = rounded_up(rows, near) / near;
    if (groups * cut.bands < 16 * threads && groups % threads != 0) cut.bands = rounded_up(cut.bands, threads);
  }
  const int64_t parts = groups * cut.bands;
  const bool even = parts >= 4 * threads || (parts % threads == 0 && layer.n % cut.together == 0);
  if (even && rows / cut.bands * columns >= kRowsATask) cut.parts = parts;
  return cut;
}

// What the depthwise convolution makes is the left operand of the product while it is in the cache.
void convolve_by_parts(const Call& call, const Cut& cut, const std::optional<Tensor>& bias, PointwiseCall& pointwise) {
  const DepthwiseLayer& layer = call.layer;
  const int64_t rows = layer.out(layer.h), columns = layer.out(layer.w), size = size_of(layer.dtype);
  const int64_t most_rows = rounded_up(rows, cut.bands) / cut.bands;
  const auto forward = RACCGAN_SELECT(forward);
  const auto tasks = RACCGAN_SELECT(tasks);
  const char* const x = static_cast<const char*>(call.x.const_data_ptr());
  pointwise.pack();
  share_out(cut.parts, call.x.numel() / cut.parts * layer.k, [&](int64_t begin, int64_t end) {
    const AlignedFloats scratch = zeros(RACCGAN_SELECT(forward_scratch)(layer, most_rows));
    const AlignedFloats u = aligned_floats(rounded_up(cut.together * most_rows * columns * layer.c * size, 4) / 4);
    const AlignedFloats product_scratch = aligned_floats(RACCGAN_SELECT(product_scratch)(pointwise.args));
    for (int64_t part = begin; part < end; ++part) {
      const int64_t sample = part / cut.bands * cut.together, band = part % cut.bands;
      const int64_t first = rows * band / cut.bands, last = rows * (band + 1) / cut.bands;
      const DepthwiseLayer some = call.samples(sample, least(cut.together, layer.n - sample));
      const void* const from = x + sample * layer.h * layer.w * layer.c * size;
      forward({some, from, call.packed.get(), bias ? bias->const_data_ptr<float>() : nullptr, first, last, u.get()},
              scratch.get(), 0, tasks(some));
      pointwise.rows((sample * rows + first) * columns, some.n * (last - first) * columns, u.get(),
                     product_scratch.get());
    }
  });
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
  const int64_t rows = call.layer.out(call.layer.h), columns = call.layer.out(call.layer.w);
  PointwiseCall product(call.x, call.layer.c, rows, columns, pointwise, pointwise_bias, residual, packed);
  const Cut cut = cut_of(call.layer);
  cut.parts == 0 ? product.all(convolve(call, bias)) : convolve_by_parts(call, cut, bias, product);
  return product.y;
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
  "Tensor x, Tensor w, Tensor? scale, Tensor? shift, int upsample, int pool, bool pre_relu, "           \
  "bool normalise, bool relu, float eps"

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def("depthwise_native(" RACCGAN_LAYER ") -> Tensor");
  // All of it in one call, without gradients, on a CPU alone.
  m.def("depthwise_separable_native(Tensor x, Tensor w, Tensor? bias, Tensor pointwise, Tensor? pointwise_bias, "
        "Tensor? scale, Tensor? shift, Tensor? residual, Tensor? packed, int upsample, int pool, bool pre_relu, "
        "bool normalise, bool relu, float eps) -> Tensor");
  // All of it in one kernel, on a GPU alone.
  m.def("depthwise_native_fused(Tensor x, Tensor w, Tensor pointwise, Tensor? bias, Tensor? scale, Tensor? shift, "
        "Tensor? residual, int upsample, int pool, bool pre_relu, bool normalise, bool relu, float eps, bool tf32) "
        "-> Tensor");
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
