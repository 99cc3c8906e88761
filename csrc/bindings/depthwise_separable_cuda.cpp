// The CUDA bindings of the depthwise half of a depthwise-separable convolution, and of its two derivatives; the schemas
// are in depthwise_separable.cpp.
#if defined(RACCGAN_CUDA) || defined(RACCGAN_EMULATION)

#include <tuple>

#include "../cuda/depthwise_separable.h"
#include "cuda.h"

namespace raccgan {
namespace {

constexpr const char* kOp = "depthwise";

Tensor as_float(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float)); }

void* data_of(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr() : nullptr; }
float* floats_of(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr<float>() : nullptr; }

// The checked operands of a call, in the layout that the kernels read.
struct Call {
  Tensor x, w;
  std::optional<Tensor> scale, shift;
  cuda::DepthwiseLayer layer;

  Call(const Tensor& x_in, const Tensor& w_in, const std::optional<Tensor>& scale_in,
       const std::optional<Tensor>& shift_in, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
       bool rectify, double eps)
      : x(x_in), w(w_in) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    const int64_t n = x.size(0), c = x.size(1), k = w.dim() == 4 ? w.size(3) : 0;
    STD_TORCH_CHECK(k > 0 && w.size(0) == c && w.size(1) == 1 && w.size(2) == k, "w must be [C, 1, k, k]");
    STD_TORCH_CHECK(k == 3 || k == 5 || k == 7, "the kernel size must be 3, 5 or 7, got ", k);
    STD_TORCH_CHECK(w.device() == x.device(), "x and w must be on one device");
    STD_TORCH_CHECK((upsample == 1 || upsample == 2) && (pool == 1 || pool == 2) && upsample * pool <= 2,
                    "upsample and pool must be 1 or 2, and not both 2");
    STD_TORCH_CHECK(scale_in.has_value() == shift_in.has_value(), "give both scale and shift, or neither");
    for (const auto& t : {scale_in, shift_in}) {
      STD_TORCH_CHECK(!t || (t->dim() == 2 && t->size(0) == n && t->size(1) == c), "scale and shift must be [N, C]");
      STD_TORCH_CHECK(!t || t->device() == x.device(), "x, scale and shift must be on one device");
    }
    if (scale_in) scale = as_float(*scale_in), shift = as_float(*shift_in);
    x = channels_last(x);
    w = as_float(w);
    layer = {n, c, x.size(2), x.size(3), k,
             upsample == 2 ? cuda::Resize::kUp : pool == 2 ? cuda::Resize::kDown : cuda::Resize::kPlain,
             rectify_first, normalise, rectify, static_cast<float>(eps), dtype_of(x, "x"),
             scale ? scale->const_data_ptr<float>() : nullptr, shift ? shift->const_data_ptr<float>() : nullptr,
             w.const_data_ptr<float>()};
  }

  Tensor like_x(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.dim() == 4 && same_sizes(t, x), what, " must be [N, C, H, W] as x is");
    return same_kind(t, what);
  }

  Tensor like_y(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == layer.n && t.size(1) == layer.c && t.size(2) == layer.out(layer.h) &&
                        t.size(3) == layer.out(layer.w),
                    what, " must be [N, C, H, W] of the output");
    return same_kind(t, what);
  }

  Tensor same_kind(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), what, " and x must be of one dtype");
    STD_TORCH_CHECK(t.device() == x.device(), what, " and x must be on one device");
    return channels_last(t);
  }

  // Outputs, empty where they are not wanted.
  Tensor new_x(bool wanted) const { return wanted ? empty_channels_last(x, layer.c, layer.h, layer.w) : nothing(); }
  Tensor new_y(bool wanted) const {
    return wanted ? empty_channels_last(x, layer.c, layer.out(layer.h), layer.out(layer.w)) : nothing();
  }
  Tensor new_parameter(bool wanted) const {
    return wanted ? torch::stable::new_empty(x, {layer.n, layer.c}, ScalarType::Float) : nothing();
  }
  Tensor new_weights(bool wanted) const {
    return wanted ? torch::stable::new_empty(x, {layer.c, 1, layer.k, layer.k}, ScalarType::Float) : nothing();
  }
  Tensor nothing() const { return torch::stable::new_empty(x, {0}); }
};

Tensor depthwise_cuda(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first,
                      bool normalise, bool rectify, double eps) {
  const OnDevice device(x);
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor y = call.new_y(true);
  if (y.numel() == 0) return y;
  const cuda::ForwardArgs args{call.layer, call.x.const_data_ptr(), y.mutable_data_ptr()};
  const Tensor scratch = scratch_like(x, cuda::forward_floats(args));
  check_launch(cuda::forward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_backward_cuda(
    const Tensor& g_in, const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
    bool rectify, double eps, bool want_x, bool want_w, bool want_affine) {
  const OnDevice device(x);
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor g = call.like_y(g_in, "g"), grad_x = call.new_x(want_x);
  Tensor grad_w = call.new_weights(want_w);
  const Tensor grad_scale = call.new_parameter(want_affine), grad_shift = call.new_parameter(want_affine);
  if (call.x.numel() == 0) return {grad_x, torch::stable::zero_(grad_w), grad_scale, grad_shift};
  const cuda::BackwardArgs args{call.layer, g.const_data_ptr(), call.x.const_data_ptr(), data_of(grad_x, want_x),
                                floats_of(grad_w, want_w), floats_of(grad_scale, want_affine),
                                floats_of(grad_shift, want_affine)};
  const Tensor scratch = scratch_like(x, cuda::backward_floats(args));
  check_launch(cuda::backward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return {grad_x, grad_w, grad_scale, grad_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_double_backward_cuda(
    const Tensor& t_in, const Tensor& g_in, const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
    bool rectify, double eps, bool want_g, bool want_x, bool want_w, bool want_scale) {
  const OnDevice device(x);
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor t = call.like_x(t_in, "t"), g = call.like_y(g_in, "g");
  const Tensor grad_g = call.new_y(want_g), grad_scale = call.new_parameter(want_scale);
  Tensor grad_x = call.new_x(want_x), grad_w = call.new_weights(want_w);
  if (want_x && !normalise) torch::stable::zero_(grad_x);
  if (call.x.numel() == 0) return {grad_g, grad_x, torch::stable::zero_(grad_w), grad_scale};
  const cuda::DoubleBackwardArgs args{call.layer, t.const_data_ptr(), g.const_data_ptr(), call.x.const_data_ptr(),
                                      data_of(grad_g, want_g), data_of(grad_x, want_x && normalise),
                                      floats_of(grad_w, want_w), floats_of(grad_scale, want_scale)};
  const Tensor scratch = scratch_like(x, cuda::double_backward_floats(args));
  check_launch(cuda::double_backward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return {grad_g, grad_x, grad_w, grad_scale};
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise_cuda));
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward_cuda));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward_cuda));
}

#endif
