// The CUDA bindings of a depthwise-separable convolution in one kernel, of its depthwise half alone, and of the two
// derivatives of that; the schemas are in depthwise_separable.cpp.
#ifdef RACCGAN_CUDA

#include <math.h>

#include <tuple>

#include "../cuda/depthwise_separable.h"
#include "cuda.h"
#include "depthwise_separable.h"

namespace raccgan {
namespace {

constexpr const char* kOp = "depthwise";

struct Call : DepthwiseCall<cuda::DepthwiseLayer> {
  template <class... Arguments>
  explicit Call(const Arguments&... arguments) : DepthwiseCall(arguments...) {
    layer.weight = w.const_data_ptr<float>();
  }

  // What the matrix product takes, as the kernel reads it.
  Tensor matrix(const Tensor& pointwise) const {
    STD_TORCH_CHECK(pointwise.dim() == 2 && pointwise.size(1) == layer.c, "pointwise must be [D, C]");
    return dense(of_x(pointwise, "pointwise"));
  }
  std::optional<Tensor> bias(const std::optional<Tensor>& t, int64_t d) const {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == d && t->scalar_type() == ScalarType::Float,
                    "bias must be [D] of float32");
    STD_TORCH_CHECK(t->device() == x.device(), "bias and x must be on one device");
    return dense(*t);
  }
  std::optional<Tensor> residual(const std::optional<Tensor>& t, int64_t d) const {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == layer.n && t->size(1) == d && t->size(2) == layer.out(layer.h) &&
                        t->size(3) == layer.out(layer.w),
                    "residual must be [N, D, H, W] of the output");
    return channels_last(of_x(*t, "residual"));
  }

 private:
  const Tensor& of_x(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), what, " and x must be of one dtype");
    STD_TORCH_CHECK(t.device() == x.device(), what, " and x must be on one device");
    return t;
  }
};

Tensor depthwise_cuda(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first,
                      bool normalise, bool rectify, double eps) {
  const OnDevice device(x);
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor y = call.new_y(true);
  if (y.numel() == 0) return y;
  const cuda::ForwardArgs args{call.layer, call.x.const_data_ptr(), y.mutable_data_ptr()};
  const Tensor scratch = scratch_like(x, cuda::forward_floats(args));
  check_launch(cuda::forward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_fused_cuda(
    const Tensor& x, const Tensor& w, const Tensor& pointwise, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const std::optional<Tensor>& residual_in,
    int64_t upsample, int64_t pool, bool rectify_first, bool normalise, bool rectify, double eps, bool tf32,
    bool statistics) {
  const OnDevice device(x);
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const cuda::DepthwiseLayer& s = call.layer;
  const Tensor matrix = call.matrix(pointwise);
  const int64_t d = matrix.size(0);
  const std::optional<Tensor> added = call.bias(bias, d), residual = call.residual(residual_in, d);
  const Tensor y = empty_channels_last(call.x, d, s.out(s.h), s.out(s.w));
  const auto statistic = [&](double of_nothing) {
    Tensor t = torch::stable::new_empty(x, statistics ? std::vector<int64_t>{s.n, d} : std::vector<int64_t>{0},
                                        ScalarType::Float);
    return y.numel() == 0 ? torch::stable::fill_(t, of_nothing) : t;
  };
  const Tensor sum = statistic(0.0), squares = statistic(0.0), largest = statistic(-INFINITY);
  if (y.numel() == 0) return {y, sum, squares, largest};
  STD_TORCH_CHECK(s.c > 0, "x must have a channel");
  const cuda::FusedArgs args{s, d, call.x.const_data_ptr(), matrix.const_data_ptr(),
                             added ? added->const_data_ptr<float>() : nullptr,
                             residual ? residual->const_data_ptr() : nullptr, tf32, y.mutable_data_ptr(),
                             floats_of(sum, statistics), floats_of(squares, statistics),
                             floats_of(largest, statistics)};
  const Tensor scratch = scratch_like(x, cuda::fused_floats(args));
  check_launch(cuda::fused(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return {y, sum, squares, largest};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_backward_cuda(
    const Tensor& g_in, const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
    bool rectify, double eps, bool want_x, bool want_w, bool want_affine) {
  const OnDevice device(x);
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor g = call.like_y(g_in, "g"), grad_x = call.new_x(want_x);
  const Tensor grad_w = call.new_weights(want_w);
  const Tensor grad_scale = call.new_parameter(want_affine), grad_shift = call.new_parameter(want_affine);
  if (call.x.numel() == 0) return {grad_x, call.zero_weights(want_w), grad_scale, grad_shift};
  const cuda::BackwardArgs args{call.layer, g.const_data_ptr(), call.x.const_data_ptr(), data_of(grad_x, want_x),
                                floats_of(grad_w, want_w), floats_of(grad_scale, want_affine),
                                floats_of(grad_shift, want_affine)};
  const Tensor scratch = scratch_like(x, cuda::backward_floats(args));
  check_launch(cuda::backward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return {grad_x, grad_w, grad_scale, grad_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_double_backward_cuda(
    const Tensor& t_in, const Tensor& g_in, const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
    bool rectify, double eps, bool want_g, bool want_x, bool want_w, bool want_scale) {
  const OnDevice device(x);
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor t = call.like_x(t_in, "t"), g = call.like_y(g_in, "g");
  const Tensor grad_g = call.new_y(want_g), grad_scale = call.new_parameter(want_scale);
  Tensor grad_x = call.new_x(want_x), grad_w = call.new_weights(want_w);
  if (want_x && !normalise) torch::stable::zero_(grad_x);
  if (call.x.numel() == 0) return {grad_g, grad_x, call.zero_weights(want_w), grad_scale};
  const cuda::DoubleBackwardArgs args{call.layer, t.const_data_ptr(), g.const_data_ptr(), call.x.const_data_ptr(),
                                      data_of(grad_g, want_g), data_of(grad_x, want_x && normalise),
                                      floats_of(grad_w, want_w), floats_of(grad_scale, want_scale)};
  const Tensor scratch = scratch_like(x, cuda::double_backward_floats(args));
  check_launch(cuda::double_backward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return {grad_g, grad_x, grad_w, grad_scale};
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise_cuda));
  m.impl("depthwise_native_fused", TORCH_BOX(&raccgan::depthwise_fused_cuda));
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward_cuda));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward_cuda));
}

#endif
