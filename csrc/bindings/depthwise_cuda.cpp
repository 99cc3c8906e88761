// The CUDA bindings of a depthwise-separable convolution in one kernel, of its depthwise half alone, and of the two
// derivatives of that; the schemas are in depthwise.cpp.
#ifdef RACCGAN_CUDA

#include "../cuda/depthwise/depthwise.h"

#include "cuda.h"
#include "depthwise.h"

namespace raccgan {
namespace {

// Queues a pass with the scratch memory that it asks for.
template <class Args>
void queue(const OnDevice& device, const Tensor& x, const Args& args, int64_t (*scratch_floats)(const Args&),
           const char* (*pass)(const Args&, float*, int, void*)) {
  const Tensor scratch = scratch_like(x, scratch_floats(args));
  check_launch(pass(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), "depthwise");
}

Tensor depthwise_cuda(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool pre_relu, bool normalise,
                      bool relu, double eps) {
  const OnDevice device(x);
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const Tensor y = call.new_y(true);
  if (y.numel() == 0) return y;
  const DepthwiseForwardArgs args{call.layer, call.x.const_data_ptr(), y.mutable_data_ptr()};
  queue(device, x, args, cuda::forward_floats, cuda::forward);
  return y;
}

Tensor depthwise_fused_cuda(const Tensor& x, const Tensor& w, const Tensor& pointwise,
                            const std::optional<Tensor>& bias_in, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& shift, const std::optional<Tensor>& residual_in,
                            int64_t upsample, int64_t pool, bool pre_relu, bool normalise, bool relu, double eps,
                            bool tf32) {
  const OnDevice device(x);
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const DepthwiseLayer& s = call.layer;
  STD_TORCH_CHECK(pointwise.dim() == 2 && pointwise.size(1) == s.c, "pointwise must be [D, C]");
  const Tensor matrix = dense(call.same_kind(pointwise, "pointwise"));
  const int64_t d = matrix.size(0);
  std::optional<Tensor> bias, residual;
  if (bias_in) {
    bias = floats(*bias_in, d, "bias must be [D] of float32");
    STD_TORCH_CHECK(bias->device() == x.device(), "bias and x must be on one device");
  }
  if (residual_in) residual = call.like_y(*residual_in, d, "residual");
  const Tensor y = empty_channels_last(call.x, d, s.out(s.h), s.out(s.w));
  if (y.numel() == 0) return y;
  STD_TORCH_CHECK(s.c > 0, "x must have a channel");
  const cuda::FusedArgs args{s,
                             d,
                             call.x.const_data_ptr(),
                             matrix.const_data_ptr(),
                             bias ? bias->const_data_ptr<float>() : nullptr,
                             residual ? residual->const_data_ptr() : nullptr,
                             tf32,
                             y.mutable_data_ptr()};
  queue(device, x, args, cuda::fused_floats, cuda::fused);
  return y;
}

FourTensors depthwise_backward_cuda(const Tensor& g, const Tensor& x, const Tensor& w,
                                    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                    int64_t upsample, int64_t pool, bool pre_relu, bool normalise, bool relu,
                                    double eps, bool needs_x, bool needs_w, bool needs_affine) {
  const OnDevice device(x);
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const DepthwiseBackward pass(call, g, needs_x, needs_w, needs_affine);
  if (!call.empty()) queue(device, x, pass.args, cuda::backward_floats, cuda::backward);
  return pass.outputs();
}

FourTensors depthwise_double_backward_cuda(const Tensor& t, const Tensor& g, const Tensor& x, const Tensor& w,
                                           const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                           int64_t upsample, int64_t pool, bool pre_relu, bool normalise, bool relu,
                                           double eps, bool needs_g, bool needs_x, bool needs_w, bool needs_scale) {
  const OnDevice device(x);
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const DepthwiseDoubleBackward pass(call, t, g, {needs_g, needs_x, needs_w, needs_scale});
  if (!call.empty()) queue(device, x, pass.args, cuda::double_backward_floats, cuda::double_backward);
  return pass.outputs();
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
