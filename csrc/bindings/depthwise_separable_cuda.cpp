// The CUDA bindings of the depthwise half of a depthwise-separable convolution, and of its two derivatives; the schemas
// are in depthwise_separable.cpp.
#if defined(RACCGAN_CUDA) || defined(RACCGAN_EMULATION)

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
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward_cuda));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward_cuda));
}

#endif
