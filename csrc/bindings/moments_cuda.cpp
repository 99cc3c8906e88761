// The CUDA bindings of the moments of each channel; the schemas are in moments.cpp.
#ifdef RACCGAN_CUDA

#include <limits>
#include <tuple>

#include "../cuda/moments.h"
#include "cuda.h"

namespace raccgan {
namespace {

// All of x as one group of pixels, and the channels_last tensor that it reads.
struct OneGroup {
  Tensor x;
  MomentsArgs args;

  explicit OneGroup(const Tensor& x_in) : x(checked(x_in)) {
    const int64_t c = x.size(1);
    args = {1, c == 0 ? 0 : x.numel() / c, c, dtype_of(x, "x"), x.const_data_ptr(), false};
  }

  static Tensor checked(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    return channels_last(x);
  }
};

std::tuple<Tensor, Tensor> moments_cuda(const Tensor& x) {
  const OnDevice device(x);
  const OneGroup of(x);
  Tensor mean = torch::stable::new_empty(x, {of.args.channels}, ScalarType::Float);
  Tensor var = torch::stable::new_empty(x, {of.args.channels}, ScalarType::Float);
  if (x.numel() == 0) {  // as PyTorch's mean of nothing
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {torch::stable::fill_(mean, nan), torch::stable::fill_(var, nan)};
  }
  const Tensor scratch = scratch_like(x, cuda::moments_floats(of.args));
  check_launch(cuda::moments(of.args, scratch.mutable_data_ptr<float>(), mean.mutable_data_ptr<float>(),
                             var.mutable_data_ptr<float>(), device.index(), device.stream()),
               "moments");
  return {mean, var};
}

// d/dx of <grad_mean, mean(x)> + <grad_var, var(x)>.
Tensor moments_backward_cuda(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x, const Tensor& mean) {
  const OnDevice device(x);
  const OneGroup of(x);
  for (const auto& t : {grad_mean, grad_var, mean}) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == of.args.channels && t.scalar_type() == ScalarType::Float,
                    "the moments and their gradients must be float32 [C]");
    STD_TORCH_CHECK(t.device() == x.device(), "the moments and their gradients must be on x's device");
  }
  const Tensor grad = empty_channels_last(x, x.size(1), x.size(2), x.size(3));
  if (x.numel() == 0) return grad;
  const Tensor by_mean = dense(grad_mean), by_var = dense(grad_var);
  const Tensor center = dense(mean);
  check_launch(cuda::moments_backward(of.args, by_mean.const_data_ptr<float>(), by_var.const_data_ptr<float>(),
                                      center.const_data_ptr<float>(), grad.mutable_data_ptr(), device.index(),
                                      device.stream()),
               "moments");
  return grad;
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("moments_native", TORCH_BOX(&raccgan::moments_cuda));
  m.impl("moments_native_backward", TORCH_BOX(&raccgan::moments_backward_cuda));
}

#endif
