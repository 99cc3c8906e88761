// The moments of each channel. All of x is one group of pixels.
#pragma once

#include <limits>
#include "../ops/moments.h"
#include "common.h"

namespace raccgan {
inline MomentsArgs moments_args(const Tensor& x) {
  return {1, pixels(x), x.size(1), dtype_of(x, "x"), x.const_data_ptr(), false};
}

template <class Device> std::tuple<Tensor, Tensor> moments(const Tensor& x_in) {
  const Device device(x_in);
  const Tensor x = image<Device>(x_in, "x");
  Tensor mean = new_floats(x, {x.size(1)}), var = new_floats(x, {x.size(1)});
  if (x.numel() == 0) {  // as PyTorch's mean of nothing
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {torch::stable::fill_(mean, nan), torch::stable::fill_(var, nan)};
  }
  device.moments(moments_args(x), mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
  return {mean, var};
}

// d/dx of <grad_mean, mean(x)> + <grad_var, var(x)>.
template <class Device>
Tensor moments_backward(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x_in, const Tensor& mean) {
  const Device device(x_in);
  const Tensor x = image<Device>(x_in, "x");
  for (const Tensor& t : {grad_mean, grad_var, mean}) {
    STD_TORCH_CHECK(t.device() == x.device(), "the moments and their gradients must be on x's device");
  }
  const char* const wrong = "the moments and their gradients must be float32 [C]";
  const Tensor by_mean = floats(grad_mean, x.size(1), wrong), by_var = floats(grad_var, x.size(1), wrong);
  const Tensor center = floats(mean, x.size(1), wrong), grad = empty_channels_last(x, x.size(1), x.size(2), x.size(3));
  if (x.numel() != 0) {
    device.moments_backward(moments_args(x), data_of(by_mean), data_of(by_var), data_of(center),
                            grad.mutable_data_ptr());
  }
  return grad;
}
}  // namespace raccgan
