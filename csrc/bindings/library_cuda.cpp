// The ops on a GPU; the schemas are in library.cpp. A call is queued on PyTorch's current stream of its tensors' device,
// asks for memory from PyTorch's allocator alone and waits for nothing, so a CUDA graph can record it.
#ifdef RACCGAN_CUDA

#include <bindings/on_device.h>
#include "../cuda/passes.h"
#include "anomaly_score.h"
#include "cbam.h"
#include "depthwise.h"
#include "moments.h"

namespace raccgan { namespace {
struct Cuda : OnDevice {
  static constexpr int64_t kMostChannelsLast = INT64_MAX;

  const Tensor& x;

  explicit Cuda(const Tensor& x) : OnDevice(x), x(x) {}

  static void check_dtype(const Tensor&, const char*) {}  // dtype_of refuses what no kernel takes
  static Tensor readable(const Tensor& t) { return channels_last(t); }

  static void check(const char* error, const char* op) {
    STD_TORCH_CHECK(error == nullptr, op, ": CUDA says: ", error);
  }
  template <class Args> void run(const char* op, const Args& args) const {
    const Tensor scratch = new_floats(x, {cuda::scratch_floats(args)});
    check(cuda::queue_pass(args, scratch.mutable_data_ptr<float>(), index(), stream()), op);
  }
  void anomaly_score(int64_t n, ImageArgs images, FeatureArgs* features, float* residual, float* feature) const {
    const int64_t image_chunks = n * chunks(images.pixels, kImageChunk);
    const int64_t feature_chunks = features ? n * chunks(features->elements, kFeatureChunk) : 0;
    const Tensor partial = torch::stable::new_empty(x, {image_chunks + feature_chunks}, ScalarType::Double);
    images.partial = partial.mutable_data_ptr<double>();
    if (features) features->partial = images.partial + image_chunks;
    check(cuda::anomaly_score(n, images, features, residual, feature, index(), stream()), "anomaly_score");
  }
  void moments(const MomentsArgs& args, float* mean, float* var) const {
    const Tensor scratch = new_floats(x, {cuda::moments_floats(args)});
    check(cuda::moments(args, scratch.mutable_data_ptr<float>(), mean, var, index(), stream()), "moments");
  }
  void moments_backward(const MomentsArgs& args, const float* grad_mean, const float* grad_var, const float* mean,
                        void* grad) const {
    check(cuda::moments_backward(args, grad_mean, grad_var, mean, grad, index(), stream()), "moments");
  }
};

// The depthwise and the pointwise convolution in one kernel.
Tensor depthwise_fused(const Tensor& x, const Tensor& w, const Tensor& pointwise, const Optional& bias_in,
                       const Optional& scale, const Optional& shift, const Optional& residual_in, int64_t upsample,
                       int64_t pool, bool pre_relu, bool normalise, bool relu, double eps, bool tf32) {
  const Cuda device(x);
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
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
  const void* const added = residual ? residual->const_data_ptr() : nullptr;
  device.run("depthwise", cuda::FusedArgs{s, d, call.x.const_data_ptr(), matrix.const_data_ptr(), data_of(bias), added,
                                          tf32, y.mutable_data_ptr()});
  return y;
}
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("anomaly_score_native", TORCH_BOX(&raccgan::anomaly_score<raccgan::Cuda>));
  m.impl("cbam_native", TORCH_BOX(&raccgan::cbam<raccgan::Cuda>));
  m.impl("cbam_native_backward", TORCH_BOX(&raccgan::cbam_backward<raccgan::Cuda>));
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise<raccgan::Cuda>));
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward<raccgan::Cuda>));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward<raccgan::Cuda>));
  m.impl("depthwise_native_fused", TORCH_BOX(&raccgan::depthwise_fused));
  m.impl("moments_native", TORCH_BOX(&raccgan::moments<raccgan::Cuda>));
  m.impl("moments_native_backward", TORCH_BOX(&raccgan::moments_backward<raccgan::Cuda>));
}

#endif
