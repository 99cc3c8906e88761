// CBAM on a GPU; the schemas are in forward.cpp and backward.cpp.
#ifdef RACCGAN_CUDA

#include "../../cuda/cbam/passes.h"
#include "../cuda.h"
#include "arguments.h"

namespace raccgan { namespace {
struct Cuda : OnDevice {
  using OnDevice::OnDevice;

  void forward(const CbamCall& call, const Tensor& x_in, const CbamForwardOutputs& to) const {
    const Tensor x = channels_last(x_in);
    const cuda::CbamForwardArgs args({call.args(to.saved), data_of(call.mean), data_of(call.var), x.const_data_ptr(),
                                      to.y.mutable_data_ptr(), to.mean.mutable_data_ptr<float>(),
                                      to.var.mutable_data_ptr<float>()});
    queue_pass(*this, x, "cbam", args, cuda::cbam_forward_floats, cuda::cbam_forward);
  }
  void backward(const CbamCall& call, const CbamBackwardInputs& of, const CbamGradientTensors& found) const {
    const Tensor x = channels_last(of.x), grad_y = channels_last(of.grad_y);
    const cuda::CbamBackwardArgs args({call.args(of.saved), x.const_data_ptr(), grad_y.const_data_ptr(), of.grad_mean,
                                       of.grad_var, found.pointers()});
    queue_pass(*this, x, "cbam", args, cuda::cbam_backward_floats, cuda::cbam_backward);
  }
};
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("cbam_native", TORCH_BOX(&raccgan::cbam<raccgan::Cuda>));
  m.impl("cbam_native_backward", TORCH_BOX(&raccgan::cbam_backward<raccgan::Cuda>));
}

#endif
