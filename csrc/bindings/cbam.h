// What CBAM's bindings for a CPU and for a GPU have in common: the checked arguments, and the tensors of the gradients.
#pragma once

#include <array>
#include <tuple>

#include "common.h"

namespace raccgan {

using Optional = std::optional<Tensor>;

inline Tensor new_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

inline Tensor in_float32(const Tensor& t, const Tensor& x, const std::vector<int64_t>& sizes, const char* name) {
  const auto actual = t.sizes();
  STD_TORCH_CHECK(std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end()), name, " has the wrong shape");
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on x's device");
  return dense(as_dtype(t, ScalarType::Float));
}

inline Optional in_float32(const Optional& t, const Tensor& x, const std::vector<int64_t>& sizes, const char* name) {
  if (!t) return std::nullopt;
  return in_float32(*t, x, sizes, name);
}

// What the forward and the backward op are given alike, checked, everything but x in float32. Shape: the kernels' own.
template <class Shape>
struct CbamGiven {
  Shape shape;
  Optional average, maximum;
  Tensor reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight, norm_weight, norm_bias;
  Optional mean, var;
  bool batch;
  float eps;

  CbamGiven(const Tensor& x, const Optional& average, const Optional& maximum, const Tensor& reduce_weight,
            const Tensor& reduce_bias, const Tensor& expand_weight, const Tensor& expand_bias,
            const Tensor& spatial_weight, const Tensor& norm_weight, const Tensor& norm_bias, const Optional& mean,
            const Optional& var, bool batch, double eps)
      : shape(shape_of(x, reduce_weight, spatial_weight)),
        average(in_float32(average, x, {shape.n, shape.c}, "average")),
        maximum(in_float32(maximum, x, {shape.n, shape.c}, "maximum")),
        reduce_weight(in_float32(reduce_weight, x, {shape.r, shape.c}, "reduce_weight")),
        reduce_bias(in_float32(reduce_bias, x, {shape.r}, "reduce_bias")),
        expand_weight(in_float32(expand_weight, x, {shape.c, shape.r}, "expand_weight")),
        expand_bias(in_float32(expand_bias, x, {shape.c}, "expand_bias")),
        spatial_weight(in_float32(spatial_weight, x, {1, 2, shape.k, shape.k}, "spatial_weight")),
        norm_weight(in_float32(norm_weight, x, {1}, "norm_weight")),
        norm_bias(in_float32(norm_bias, x, {1}, "norm_bias")),
        mean(in_float32(mean, x, {1}, "mean")),
        var(in_float32(var, x, {1}, "var")),
        batch(batch),
        eps(static_cast<float>(eps)) {
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "give both mean and var, or neither");
  }

  static Shape shape_of(const Tensor& x, const Tensor& reduce_weight, const Tensor& spatial_weight) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "x must have a channel and a pixel at least");
    STD_TORCH_CHECK(reduce_weight.dim() == 2, "reduce_weight must be [R, C]");
    STD_TORCH_CHECK(spatial_weight.dim() == 4 && spatial_weight.size(3) % 2 == 1,
                    "spatial_weight must be [1, 2, k, k] with odd k");
    return {x.size(0), x.size(1), x.size(2), x.size(3), reduce_weight.size(0), spatial_weight.size(3),
            dtype_of(x, "x")};
  }

  int64_t pixels() const { return shape.h * shape.w; }
  bool fixed() const { return mean.has_value(); }
  bool shared() const { return fixed() || batch; }  // whether all samples have the same moments
  int64_t moments() const { return shared() ? 1 : shape.n; }
  std::vector<int64_t> own_moments() const { return {fixed() ? 0 : moments()}; }  // sizes of those that are returned

  // All that the backward op is handed of the forward op's work, in one tensor.
  int64_t saved_floats() const {
    return shape.n * (3 * shape.c + 3 * shape.r + 3 * pixels()) + 2 * moments();
  }

  void check_backward(const Tensor& g_y, const Tensor& x, const Tensor& saved) const {
    STD_TORCH_CHECK(same_sizes(g_y, x) && g_y.scalar_type() == x.scalar_type() && g_y.device() == x.device(),
                    "g_y must be as x is");
    STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Float && saved.is_contiguous() && saved.device() == x.device() &&
                        saved.numel() == saved_floats(),
                    "saved must come from cbam_native with the same arguments");
  }
};

// The tensors of CbamGiven in its order, x first: bit i of `wanted` asks for the gradient of the i-th.
enum Input {
  kX, kAverage, kMaximum, kReduceWeight, kReduceBias, kExpandWeight, kExpandBias, kSpatialWeight, kNormWeight,
  kNormBias, kMean, kVar, kInputs
};
constexpr int64_t bit(Input input) { return int64_t{1} << input; }

using Gradients = std::array<Tensor, kInputs>;

// A float32 tensor for each gradient that is wanted, and an empty one for the others; x's is of x's dtype.
template <class Shape>
Gradients new_gradients(const Shape& s, const Tensor& x, int64_t wanted) {
  const std::vector<int64_t> sizes[kInputs] = {{}, {s.n, s.c}, {s.n, s.c}, {s.r, s.c}, {s.r}, {s.c, s.r}, {s.c},
                                               {1, 2, s.k, s.k}, {1}, {1}, {1}, {1}};
  const auto made = [&](int i) {
    if (!(wanted >> i & 1)) return new_floats(x, {0});
    return i == kX ? empty_channels_last(x, s.c, s.h, s.w) : new_floats(x, sizes[i]);
  };
  return {made(0), made(1), made(2), made(3), made(4), made(5), made(6), made(7), made(8), made(9), made(10), made(11)};
}

using TwelveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor>;

// Each gradient in the dtype of its tensor: everything but x's is made in float32.
inline TwelveTensors in_their_dtypes(const Gradients& g, const Optional& average, const Optional& maximum,
                                     const Tensor& reduce_weight, const Tensor& reduce_bias,
                                     const Tensor& expand_weight, const Tensor& expand_bias,
                                     const Tensor& spatial_weight, const Tensor& norm_weight, const Tensor& norm_bias,
                                     const Optional& mean, const Optional& var) {
  const auto as = [&](int i, const Tensor& t) { return as_dtype(g[i], t.scalar_type()); };
  const auto as_given = [&](int i, const Optional& t) { return t ? as(i, *t) : g[i]; };
  return {g[kX],
          as_given(kAverage, average),
          as_given(kMaximum, maximum),
          as(kReduceWeight, reduce_weight),
          as(kReduceBias, reduce_bias),
          as(kExpandWeight, expand_weight),
          as(kExpandBias, expand_bias),
          as(kSpatialWeight, spatial_weight),
          as(kNormWeight, norm_weight),
          as(kNormBias, norm_bias),
          as_given(kMean, mean),
          as_given(kVar, var)};
}

}  // namespace raccgan
