// The moments of each channel, but for how a CPU and a GPU find them: operands, checks and outputs.
#pragma once

#include <limits>
#include "../ops/moments.h"
#include "common.h"

namespace raccgan {
// Device: where an op runs; its image(x) is x, checked and in channels_last. All of x is one group of pixels.
template <class Device> std::tuple<Tensor, Tensor> moments(const Tensor& x_in) {
  const Device device(x_in);
  const Tensor x = device.image(x_in);
  const MomentsArgs args{1, pixels(x), x.size(1), dtype_of(x, "x"), x.const_data_ptr(), false};
  Tensor mean = new_floats(x, {args.channels}), var = new_floats(x, {args.channels});
  if (x.numel() == 0) {  // as PyTorch's mean of nothing
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {torch::stable::fill_(mean, nan), torch::stable::fill_(var, nan)};
  }
  device.find(x, args, mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>());
  return {mean, var};
}

// d/dx of <grad_mean, mean(x)> + <grad_var, var(x)>.
template <class Device>
Tensor moments_backward(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x_in, const Tensor& mean) {
  const Device device(x_in);
  const Tensor x = device.image(x_in);
  const MomentsArgs args{1, pixels(x), x.size(1), dtype_of(x, "x"), x.const_data_ptr(), false};
  for (const auto& t : {grad_mean, grad_var, mean}) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == args.channels && t.scalar_type() == ScalarType::Float,
                    "the moments and their gradients must be float32 [C]");
    STD_TORCH_CHECK(t.device() == x.device(), "the moments and their gradients must be on x's device");
  }
  const Tensor grad = empty_channels_last(x, x.size(1), x.size(2), x.size(3));
  if (x.numel() == 0) return grad;
  const Tensor by_mean = dense(grad_mean), by_var = dense(grad_var), center = dense(mean);
  device.spread(args, data_of(by_mean), data_of(by_var), data_of(center), grad.mutable_data_ptr());
  return grad;
}
}  // namespace raccgan
