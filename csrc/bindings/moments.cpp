// The CPU bindings of the moments of each channel, and the schemas of these ops.
#include <cmath>
#include <limits>
#include <tuple>

#include "../cpu/moments.h"
#include "common.h"

namespace raccgan {
namespace {

std::tuple<Tensor, Tensor> moments_cpu(const Tensor& x_in) {
  const Tensor x = image(x_in, "x");
  const int64_t m = pixels(x), c = x.size(1);
  const Tensor mean = torch::stable::new_empty(x, {c}, ScalarType::Float);
  const Tensor var = torch::stable::new_empty(x, {c}, ScalarType::Float);
  float *const mean_data = mean.mutable_data_ptr<float>(), *const var_data = var.mutable_data_ptr<float>();
  if (x.numel() == 0) {  // as PyTorch's mean of nothing
    std::fill_n(mean_data, c, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(var_data, c, std::numeric_limits<float>::quiet_NaN());
    return {mean, var};
  }
  std::vector<float> partial(moments_chunks(m) * 2 * c), center(c);
  const MomentsArgs args{1, m, c, dtype_of(x, "x"), x.const_data_ptr(), false};
  RACCGAN_SELECT(find_center)(args, center.data());
  const auto moments = RACCGAN_SELECT(moments);
  const int64_t tasks = moments_tasks(m, c);
  share_out(tasks, m * c / tasks,
            [&](int64_t begin, int64_t end) { moments(args, center.data(), partial.data(), begin, end); });
  for (int64_t i = 0; i < c; ++i) {
    double sum = 0, squares = 0;
    for (int64_t chunk = 0; chunk < moments_chunks(m); ++chunk) {
      sum += partial[chunk * 2 * c + i];
      squares += partial[(chunk * 2 + 1) * c + i];
    }
    const double distance = sum / m, spread = squares / m - distance * distance;
    mean_data[i] = static_cast<float>(center[i] + distance);
    var_data[i] = static_cast<float>(spread < 0 ? 0 : spread);  // NaN stays NaN
  }
  return {mean, var};
}

// d/dx of <grad_mean, mean(x)> + <grad_var, var(x)>.
Tensor moments_backward_cpu(const Tensor& grad_mean_in, const Tensor& grad_var_in, const Tensor& x_in,
                            const Tensor& mean_in) {
  const Tensor x = image(x_in, "x");
  const int64_t m = pixels(x), c = x.size(1);
  for (const auto& t : {grad_mean_in, grad_var_in, mean_in}) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == c && t.scalar_type() == ScalarType::Float,
                    "the moments and their gradients must be float32 [C]");
  }
  const Tensor grad = empty_channels_last(x, x.size(1), x.size(2), x.size(3));
  if (x.numel() == 0) return grad;
  const Tensor grad_mean = dense(grad_mean_in), grad_var = dense(grad_var_in);
  const Tensor mean = dense(mean_in);
  std::vector<float> slope(c), constant(c);
  for (int64_t i = 0; i < c; ++i) {
    slope[i] = static_cast<float>(2.0 * grad_var.const_data_ptr<float>()[i] / m);
    constant[i] = static_cast<float>(grad_mean.const_data_ptr<float>()[i] / static_cast<double>(m));
  }
  const AffineArgs args{{1, m, c, dtype_of(x, "x"), x.const_data_ptr(), false},
                        slope.data(),
                        mean.const_data_ptr<float>(),
                        constant.data(),
                        grad.mutable_data_ptr()};
  const auto affine = RACCGAN_SELECT(affine);
  share_out(m, c, [&](int64_t begin, int64_t end) { affine(args, begin, end); });
  return grad;
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def("moments_native(Tensor x) -> (Tensor, Tensor)");
  m.def("moments_native_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("moments_native", TORCH_BOX(&raccgan::moments_cpu));
  m.impl("moments_native_backward", TORCH_BOX(&raccgan::moments_backward_cpu));
}
