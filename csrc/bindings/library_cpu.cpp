// The ops on a CPU, and what the CPU kernels take from PyTorch. The schemas are in library.cpp.
#include <new>
#include "../cpu/kernels.h"
#include "../cpu/threads.h"
#include "anomaly_score.h"
#include "cbam.h"
#include "depthwise.h"
#include "moments.h"
#include "pointwise.h"

namespace raccgan {
int64_t thread_count() { return torch::stable::get_num_threads(); }

void run_threads(int64_t count, int64_t grain, void (*work)(const void* of, int64_t begin, int64_t end),
                 const void* of) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { work(of, begin, end); });
}

constexpr std::align_val_t kAlignment{64};
void* allocate(int64_t bytes) { return ::operator new(bytes, kAlignment); }
void release(void* memory) { ::operator delete(memory, kAlignment); }

namespace {
struct Cpu {
  static constexpr int64_t kMostChannelsLast = raccgan::kMostChannelsLast;

  explicit Cpu(const Tensor&) {}

  static void check_dtype(const Tensor& t, const char* what) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, what,
                    " must be float32 or bfloat16");
  }
  // CBAM's kernels read both layouts.
  static Tensor readable(const Tensor& t) { return is_channels_last(t) ? t : dense(t); }

  static void anomaly_score(int64_t n, const ImageArgs& images, const FeatureArgs* features, float* residual,
                            float* feature) {
    RACCGAN_SELECT(anomaly_score)(n, images, features, residual, feature);
  }
  static void moments(const MomentsArgs& args, float* mean, float* var) { RACCGAN_SELECT(moments)(args, mean, var); }
  static void moments_backward(const MomentsArgs& args, const float* grad_mean, const float* grad_var,
                               const float* mean, void* grad) {
    RACCGAN_SELECT(moments_backward)(args, grad_mean, grad_var, mean, grad);
  }
  static void run(const char*, const CbamForwardArgs& args) { RACCGAN_SELECT(cbam_forward)(args); }
  static void run(const char*, const CbamBackwardArgs& args) { RACCGAN_SELECT(cbam_backward)(args); }
  static void run(const char*, const DepthwiseForwardArgs& args) { RACCGAN_SELECT(depthwise_forward)(args); }
  static void run(const char*, const DepthwiseBackwardArgs& args) { RACCGAN_SELECT(depthwise_backward)(args); }
  static void run(const char*, const DepthwiseDoubleBackwardArgs& args) {
    RACCGAN_SELECT(depthwise_double_backward)(args);
  }
};

// For norm "instance": the gradients of <grad_grad_x, gradient of x>, of grad_y, x and the weights.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_double_backward(
    const Tensor& grad_grad_x, const Tensor& grad_y_in, const Tensor& x_in, const Tensor& reduce_weight,
    const Tensor& reduce_bias, const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight,
    const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& saved) {
  Cpu::check_dtype(x_in, "x");
  const CbamParameters parameters{reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                                  norm_weight,   norm_bias,   std::nullopt,  std::nullopt};
  const CbamCall call(x_in, parameters, false, eps);
  call.check_backward(grad_y_in, saved);
  call.check_like_x(grad_grad_x, "grad_grad_x");
  const Tensor x = channels_last(x_in), grad_y = channels_last(grad_y_in), v = channels_last(grad_grad_x);
  const Tensor grad_grad_y = call.new_x();
  const CbamGradientTensors found(call, true, {true, true, true, true, true, true, true});
  RACCGAN_SELECT(cbam_double_backward)({call.args(saved), x.const_data_ptr(), grad_y.const_data_ptr(),
                                        v.const_data_ptr(), grad_grad_y.mutable_data_ptr(), found.pointers()});
  const auto [of_x, rw, rb, ew, eb, sw, nw, nb, mean, var] = found.all(call);
  return {grad_grad_y, of_x, rw, rb, ew, eb, sw, nw, nb};
}

// The depthwise and the pointwise convolution in one call, without gradients.
Tensor depthwise_separable(const Tensor& x, const Tensor& w, const Optional& bias_in, const Tensor& pointwise,
                           const Optional& pointwise_bias, const Optional& scale, const Optional& shift,
                           const Optional& residual, const Optional& packed, int64_t upsample, int64_t pool,
                           bool pre_relu, bool normalise, bool relu, double eps) {
  Cpu::check_dtype(x, "x");
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const DepthwiseLayer& s = call.layer;
  Optional bias;
  if (bias_in) bias = floats(*bias_in, s.c, "the depthwise bias must be float32 [C]");
  const PointwiseCall product(call.x, s.c, s.out(s.h), s.out(s.w), pointwise, pointwise_bias, residual, packed);
  RACCGAN_SELECT(depthwise_separable)({s, call.x.const_data_ptr(), nullptr}, data_of(bias), product.args);
  return product.y;
}
}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("anomaly_score_native", TORCH_BOX(&raccgan::anomaly_score<raccgan::Cpu>));
  m.impl("cbam_native", TORCH_BOX(&raccgan::cbam<raccgan::Cpu>));
  m.impl("cbam_native_backward", TORCH_BOX(&raccgan::cbam_backward<raccgan::Cpu>));
  m.impl("cbam_native_double_backward", TORCH_BOX(&raccgan::cbam_double_backward));
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise<raccgan::Cpu>));
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward<raccgan::Cpu>));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward<raccgan::Cpu>));
  m.impl("depthwise_separable_native", TORCH_BOX(&raccgan::depthwise_separable));
  m.impl("moments_native", TORCH_BOX(&raccgan::moments<raccgan::Cpu>));
  m.impl("moments_native_backward", TORCH_BOX(&raccgan::moments_backward<raccgan::Cpu>));
  m.impl("pointwise_native", TORCH_BOX(&raccgan::pointwise<raccgan::Cpu>));
  m.impl("pointwise_native_packed", TORCH_BOX(&raccgan::pointwise_packed));
  m.impl("pointwise_native_product", TORCH_BOX(&raccgan::pointwise_product<raccgan::Cpu>));
  m.impl("pointwise_native_transposed", TORCH_BOX(&raccgan::pointwise_transposed<raccgan::Cpu>));
}
