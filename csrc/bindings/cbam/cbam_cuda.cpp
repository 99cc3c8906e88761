// The CUDA bindings of CBAM; the schemas are in forward.cpp and backward.cpp.
#ifdef RACCGAN_CUDA

#include "../../cuda/cbam/passes.h"
#include "../cuda.h"
#include "arguments.h"

namespace raccgan {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> cbam_cuda(
    const Tensor& x_in, const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& expand_weight,
    const Tensor& expand_bias, const Tensor& spatial_weight, const Tensor& norm_weight, const Tensor& norm_bias,
    const Optional& mean, const Optional& var, bool batch, double eps) {
  const OnDevice device(x_in);
  const CbamCall call({x_in, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight, norm_weight,
                       norm_bias, mean, var, batch, eps});
  const CbamShape& s = call.shape;
  const Tensor x = channels_last(x_in), y = empty_channels_last(x, s.c, s.h, s.w), saved = call.new_saved(x);
  const Tensor own_mean = new_floats(x, call.own_moments()), own_var = new_floats(x, call.own_moments());
  const cuda::CbamForwardArgs args{call.args(saved),
                                   data_of(call.mean),
                                   data_of(call.var),
                                   x.const_data_ptr(),
                                   y.mutable_data_ptr(),
                                   own_mean.mutable_data_ptr<float>(),
                                   own_var.mutable_data_ptr<float>()};
  const Tensor scratch = scratch_like(x, cuda::cbam_forward_floats(args));
  check_launch(cuda::cbam_forward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), "cbam");
  return {y, own_mean, own_var, saved};
}

TenTensors cbam_backward_cuda(const Tensor& grad_y_in, const Optional& grad_mean_in, const Optional& grad_var_in,
                              const Tensor& x_in, const Tensor& reduce_weight, const Tensor& reduce_bias,
                              const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight,
                              const Tensor& norm_weight, const Tensor& norm_bias, const Optional& mean,
                              const Optional& var, bool batch, double eps, const Tensor& saved, bool needs_x,
                              bool needs_mlp, bool needs_spatial_weight, bool needs_norm, bool needs_moments) {
  const OnDevice device(x_in);
  const CbamInputs in{x_in,        reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                      norm_weight, norm_bias,     mean,        var,           batch,       eps};
  const CbamCall call(in);
  call.check_backward(grad_y_in, x_in, saved);
  const Optional grad_mean = in_float32(grad_mean_in, x_in, call.own_moments(), "grad_mean");
  const Optional grad_var = in_float32(grad_var_in, x_in, call.own_moments(), "grad_var");
  const Tensor x = channels_last(x_in), grad_y = channels_last(grad_y_in);
  const CbamGradientTensors found(
      call.shape, x, {needs_x, needs_mlp, needs_spatial_weight, needs_norm, needs_moments && call.fixed()});
  const cuda::CbamBackwardArgs args{call.args(saved),   x.const_data_ptr(), grad_y.const_data_ptr(),
                                    data_of(grad_mean), data_of(grad_var),  found.pointers()};
  const Tensor scratch = scratch_like(x, cuda::cbam_backward_floats(args));
  check_launch(cuda::cbam_backward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), "cbam");
  return found.all(in);
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("cbam_native", TORCH_BOX(&raccgan::cbam_cuda));
  m.impl("cbam_native_backward", TORCH_BOX(&raccgan::cbam_backward_cuda));
}

#endif
