// The GPU's side of the depthwise ops, and the whole convolution in one kernel; the schemas are in depthwise.cpp.
#ifdef RACCGAN_CUDA

#include "../cuda/depthwise/depthwise.h"
#include "cuda.h"
#include "depthwise.h"

namespace raccgan { namespace {
struct CudaCall : OnDevice, DepthwiseCall {
  CudaCall(const Tensor& x, const Tensor& w, const Optional& scale, const Optional& shift,
           const DepthwiseOptions& options)
      : OnDevice(x), DepthwiseCall(x, w, scale, shift, options) {}

  template <class Args>
  void queue(const Args& args, int64_t (*scratch_floats)(const Args&),
             const char* (*pass)(const Args&, float*, int, void*)) const {
    queue_pass(*this, x, "depthwise", args, scratch_floats, pass);
  }
  void forward(const DepthwiseForwardArgs& args) const { queue(args, cuda::forward_floats, cuda::forward); }
  void backward(const DepthwiseBackwardArgs& args, const Tensor&) const {
    queue(args, cuda::backward_floats, cuda::backward);
  }
  void double_backward(const DepthwiseDoubleBackwardArgs& args, const Tensor&) const {
    queue(args, cuda::double_backward_floats, cuda::double_backward);
  }
};

Tensor depthwise_fused_cuda(const Tensor& x, const Tensor& w, const Tensor& pointwise, const Optional& bias_in,
                            const Optional& scale, const Optional& shift, const Optional& residual_in, int64_t upsample,
                            int64_t pool, bool pre_relu, bool normalise, bool relu, double eps, bool tf32) {
  const CudaCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const DepthwiseLayer& s = call.layer;
  STD_TORCH_CHECK(pointwise.dim() == 2 && pointwise.size(1) == s.c, "pointwise must be [D, C]");
  const Tensor matrix = dense(call.same_kind(pointwise, "pointwise"));
  const int64_t d = matrix.size(0);
  Optional bias, residual;
  if (bias_in) {
    bias = floats(*bias_in, d, "bias must be [D] of float32");
    STD_TORCH_CHECK(bias->device() == x.device(), "bias and x must be on one device");
  }
  if (residual_in) residual = call.like_y(*residual_in, d, "residual");
  const Tensor y = empty_channels_last(call.x, d, s.out(s.h), s.out(s.w));
  if (y.numel() == 0) return y;
  STD_TORCH_CHECK(s.c > 0, "x must have a channel");
  const cuda::FusedArgs args({s, d, call.x.const_data_ptr(), matrix.const_data_ptr(), data_of(bias),
                              residual ? residual->const_data_ptr() : nullptr, tf32, y.mutable_data_ptr()});
  call.queue(args, cuda::fused_floats, cuda::fused);
  return y;
}
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise<raccgan::CudaCall>));
  m.impl("depthwise_native_fused", TORCH_BOX(&raccgan::depthwise_fused_cuda));
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward<raccgan::CudaCall>));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward<raccgan::CudaCall>));
}

#endif
