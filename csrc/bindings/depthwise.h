// The depthwise ops: operands, checks and outputs.
#pragma once

#include "../ops/depthwise.h"
#include "common.h"

namespace raccgan {
struct DepthwiseOptions {
  int64_t upsample, pool;
  bool pre_relu, normalise, relu;
  double eps;

  Resize resize() const {
    STD_TORCH_CHECK((upsample == 1 || upsample == 2) && (pool == 1 || pool == 2) && upsample * pool <= 2,
                    "upsample and pool must be 1 or 2, and not both 2");
    return upsample == 2 ? Resize::kUp : pool == 2 ? Resize::kDown : Resize::kNone;
  }
};

// The operands, checked and in the layout that the kernels read, and new outputs.
struct DepthwiseCall {
  Tensor x, w;
  Optional scale, shift;
  DepthwiseLayer layer;

  DepthwiseCall(const Tensor& x_in, const Tensor& w_in, const Optional& scale_in, const Optional& shift_in,
                const DepthwiseOptions& options)
      : x(x_in), w(w_in) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    const int64_t n = x.size(0), c = x.size(1), k = w.dim() == 4 ? w.size(3) : 0;
    STD_TORCH_CHECK(k > 0 && w.size(0) == c && w.size(1) == 1 && w.size(2) == k, "w must be [C, 1, k, k]");
    STD_TORCH_CHECK(k == 3 || k == 5 || k == 7, "the kernel size must be 3, 5 or 7, got ", k);
    STD_TORCH_CHECK(w.device() == x.device(), "x and w must be on one device");
    STD_TORCH_CHECK(scale_in.has_value() == shift_in.has_value(), "give both scale and shift, or neither");
    for (const auto& t : {scale_in, shift_in}) {
      STD_TORCH_CHECK(!t || (t->dim() == 2 && t->size(0) == n && t->size(1) == c), "scale and shift must be [N, C]");
      STD_TORCH_CHECK(!t || t->device() == x.device(), "x, scale and shift must be on one device");
    }
    if (scale_in) scale = as_float(*scale_in), shift = as_float(*shift_in);
    x = channels_last(x);
    w = as_float(w);
    layer = DepthwiseLayer({n, c, x.size(2), x.size(3), k, options.resize(), options.pre_relu, options.normalise,
                            options.relu, static_cast<float>(options.eps), dtype_of(x, "x"), data_of(scale),
                            data_of(shift), data_of(w)});
  }

  bool empty() const { return x.numel() == 0; }

  Tensor like_x(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.dim() == 4 && same_sizes(t, x), what, " must be [N, C, H, W] as x is");
    return channels_last(same_kind(t, what));
  }

  // With so many channels.
  Tensor like_y(const Tensor& t, int64_t channels, const char* what) const {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == layer.n && t.size(1) == channels && t.size(2) == layer.out(layer.h) &&
                        t.size(3) == layer.out(layer.w),
                    what, " must be of the output's shape");
    return channels_last(same_kind(t, what));
  }

  const Tensor& same_kind(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), what, " and x must be of one dtype");
    STD_TORCH_CHECK(t.device() == x.device(), what, " and x must be on one device");
    return t;
  }

  // Outputs, empty where they are not needed.
  Tensor new_x(bool needed) const { return needed ? empty_channels_last(x, layer.c, layer.h, layer.w) : nothing(); }
  Tensor new_y(bool needed) const {
    return needed ? empty_channels_last(x, layer.c, layer.out(layer.h), layer.out(layer.w)) : nothing();
  }
  Tensor new_parameter(bool needed) const { return new_sum({layer.n, layer.c}, needed); }
  Tensor new_weights(bool needed) const { return new_sum({layer.c, 1, layer.k, layer.k}, needed); }

 private:
  Tensor nothing() const { return torch::stable::new_empty(x, {0}); }

  // A sum over pixels: zero where there are none.
  Tensor new_sum(const std::vector<int64_t>& sizes, bool needed) const {
    if (!needed) return nothing();
    Tensor t = torch::stable::new_empty(x, sizes, ScalarType::Float);
    return empty() ? torch::stable::zero_(t) : t;
  }

  static Tensor as_float(const Tensor& t) { return dense(as_dtype(t, ScalarType::Float)); }
};

template <class Device>
Tensor depthwise(const Tensor& x, const Tensor& w, const Optional& scale, const Optional& shift, int64_t upsample,
                 int64_t pool, bool pre_relu, bool normalise, bool relu, double eps) {
  const Device device(x);
  Device::check_dtype(x, "x");
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const Tensor y = call.new_y(true);
  if (y.numel() != 0) {
    device.run("depthwise", DepthwiseForwardArgs{call.layer, call.x.const_data_ptr(), y.mutable_data_ptr()});
  }
  return y;
}

template <class Device>
FourTensors depthwise_backward(const Tensor& g_in, const Tensor& x, const Tensor& w, const Optional& scale,
                               const Optional& shift, int64_t upsample, int64_t pool, bool pre_relu, bool normalise,
                               bool relu, double eps, bool needs_x, bool needs_w, bool needs_affine) {
  const Device device(x);
  Device::check_dtype(x, "x");
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const Tensor g = call.like_y(g_in, call.layer.c, "g"), grad_x = call.new_x(needs_x);
  const Tensor grad_w = call.new_weights(needs_w);
  const Tensor grad_scale = call.new_parameter(needs_affine), grad_shift = call.new_parameter(needs_affine);
  if (!call.empty()) {
    device.run("depthwise",
               DepthwiseBackwardArgs{call.layer, g.const_data_ptr(), call.x.const_data_ptr(), out_of(grad_x),
                                     floats_of(grad_w), floats_of(grad_scale), floats_of(grad_shift)});
  }
  return {grad_x, grad_w, grad_scale, grad_shift};
}

template <class Device>
FourTensors depthwise_double_backward(const Tensor& t_in, const Tensor& g_in, const Tensor& x, const Tensor& w,
                                      const Optional& scale, const Optional& shift, int64_t upsample, int64_t pool,
                                      bool pre_relu, bool normalise, bool relu, double eps, bool needs_g, bool needs_x,
                                      bool needs_w, bool needs_scale) {
  const Device device(x);
  Device::check_dtype(x, "x");
  const DepthwiseCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  const Tensor t = call.like_x(t_in, "t"), g = call.like_y(g_in, call.layer.c, "g");
  const Tensor grad_g = call.new_y(needs_g), grad_w = call.new_weights(needs_w);
  const Tensor grad_scale = call.new_parameter(needs_scale);
  Tensor grad_x = call.new_x(needs_x);
  if (needs_x && !normalise) torch::stable::zero_(grad_x);
  if (!call.empty()) {
    device.run("depthwise",
               DepthwiseDoubleBackwardArgs{call.layer, t.const_data_ptr(), g.const_data_ptr(), call.x.const_data_ptr(),
                                           out_of(grad_g), normalise ? out_of(grad_x) : nullptr, floats_of(grad_w),
                                           floats_of(grad_scale)});
  }
  return {grad_g, grad_x, grad_w, grad_scale};
}
}  // namespace raccgan
