// What the depthwise bindings for a CPU and for a GPU have in common: the checked operands of a call.
#pragma once

#include "common.h"

namespace raccgan {

inline void* data_of(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr() : nullptr; }
inline float* floats_of(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr<float>() : nullptr; }

// The operands, in the layout that the kernels read. Layer: the kernels' own, of which what follows `shift` is left open.
template <class Layer>
struct DepthwiseCall {
  Tensor x, w;
  std::optional<Tensor> scale, shift;
  Layer layer;

  DepthwiseCall(const Tensor& x_in, const Tensor& w_in, const std::optional<Tensor>& scale_in,
                const std::optional<Tensor>& shift_in, int64_t upsample, int64_t pool, bool rectify_first,
                bool normalise, bool rectify, double eps)
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
    using Resize = decltype(layer.resize);
    layer = {n, c, x.size(2), x.size(3), k,
             upsample == 2 ? Resize::kUp : pool == 2 ? Resize::kDown : Resize::kPlain,
             rectify_first, normalise, rectify, static_cast<float>(eps), dtype_of(x, "x"),
             scale ? scale->const_data_ptr<float>() : nullptr, shift ? shift->const_data_ptr<float>() : nullptr};
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
  // What a call on nothing returns.
  Tensor zero_weights(bool wanted) const {
    Tensor zeros = new_weights(wanted);
    return torch::stable::zero_(zeros);
  }

 private:
  Tensor nothing() const { return torch::stable::new_empty(x, {0}); }

  static Tensor as_float(const Tensor& t) { return dense(as_dtype(t, ScalarType::Float)); }

  Tensor same_kind(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), what, " and x must be of one dtype");
    STD_TORCH_CHECK(t.device() == x.device(), what, " and x must be on one device");
    return channels_last(t);
  }
};

}  // namespace raccgan
