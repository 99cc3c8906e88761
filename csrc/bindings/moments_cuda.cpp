// The moments of each channel on a GPU; the schemas are in moments.cpp.
#ifdef RACCGAN_CUDA

#include "../cuda/moments.h"
#include "cuda.h"
#include "moments.h"

namespace raccgan { namespace {
struct Cuda : OnDevice {
  using OnDevice::OnDevice;

  static Tensor image(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    return channels_last(x);
  }
  void find(const Tensor& x, const MomentsArgs& args, float* mean, float* var) const {
    const Tensor scratch = new_floats(x, {cuda::moments_floats(args)});
    check_launch(cuda::moments(args, scratch.mutable_data_ptr<float>(), mean, var, index(), stream()), "moments");
  }
  void spread(const MomentsArgs& args, const float* grad_mean, const float* grad_var, const float* mean,
              void* grad) const {
    check_launch(cuda::moments_backward(args, grad_mean, grad_var, mean, grad, index(), stream()), "moments");
  }
};
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("moments_native", TORCH_BOX(&raccgan::moments<raccgan::Cuda>));
  m.impl("moments_native_backward", TORCH_BOX(&raccgan::moments_backward<raccgan::Cuda>));
}

#endif
