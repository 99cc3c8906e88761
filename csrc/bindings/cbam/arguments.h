// CBAM's ops, but for how a CPU and a GPU run a pass: operands, checks and outputs.
#pragma once

#include "../../ops/cbam.h"
#include "../common.h"

namespace raccgan {
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

// The arguments that all ops of CBAM have, as PyTorch hands them over.
struct CbamInputs {
  const Tensor& x;
  const Tensor &reduce_weight, &reduce_bias, &expand_weight, &expand_bias, &spatial_weight, &norm_weight, &norm_bias;
  const Optional &mean, &var;
  bool batch;
  double eps;
};

// The same, checked; everything but x in float32.
struct CbamCall {
  CbamShape shape;
  CbamNorm norm;
  Tensor reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight, norm_weight, norm_bias;
  Optional mean, var;
  float eps;

  explicit CbamCall(const CbamInputs& in)
      : shape(shape_of(in)), norm(in.mean ? CbamNorm::kFixed : (in.batch ? CbamNorm::kBatch : CbamNorm::kInstance)),
        reduce_weight(in_float32(in.reduce_weight, in.x, {shape.r, shape.c}, "reduce_weight")),
        reduce_bias(in_float32(in.reduce_bias, in.x, {shape.r}, "reduce_bias")),
        expand_weight(in_float32(in.expand_weight, in.x, {shape.c, shape.r}, "expand_weight")),
        expand_bias(in_float32(in.expand_bias, in.x, {shape.c}, "expand_bias")),
        spatial_weight(in_float32(in.spatial_weight, in.x, {1, 2, shape.k, shape.k}, "spatial_weight")),
        norm_weight(in_float32(in.norm_weight, in.x, {1}, "norm_weight")),
        norm_bias(in_float32(in.norm_bias, in.x, {1}, "norm_bias")), mean(in_float32(in.mean, in.x, {1}, "mean")),
        var(in_float32(in.var, in.x, {1}, "var")), eps(static_cast<float>(in.eps)) {
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "give both mean and var, or neither");
  }

  static CbamShape shape_of(const CbamInputs& in) {
    const Tensor& x = in.x;
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "x must have a channel and a pixel at least");
    STD_TORCH_CHECK(in.reduce_weight.dim() == 2, "reduce_weight must be [R, C]");
    STD_TORCH_CHECK(in.spatial_weight.dim() == 4 && in.spatial_weight.size(3) % 2 == 1,
                    "spatial_weight must be [1, 2, k, k] with odd k");
    const int64_t r = in.reduce_weight.size(0), k = in.spatial_weight.size(3);
    return {x.size(0), x.size(1), x.size(2), x.size(3), r, k, dtype_of(x, "x")};
  }

  bool fixed() const { return norm == CbamNorm::kFixed; }
  bool coupled() const { return norm == CbamNorm::kBatch; }  // whether the moments depend on all samples

  // Sizes of the moments that the forward op returns: none where they were given.
  std::vector<int64_t> own_moments() const { return {fixed() ? 0 : moments(shape, norm)}; }

  // The part of the kernels' arguments that every pass has.
  CbamArgs args(const Tensor& saved) const {
    const CbamWeights weights({data_of(reduce_weight), data_of(reduce_bias), data_of(expand_weight),
                               data_of(expand_bias), data_of(spatial_weight), data_of(norm_weight), data_of(norm_bias),
                               eps});
    return {shape, weights, saved_in(shape, const_cast<float*>(data_of(saved))), norm};
  }

  void check_backward(const Tensor& grad_y, const Tensor& x, const Tensor& saved) const {
    STD_TORCH_CHECK(same_sizes(grad_y, x) && grad_y.scalar_type() == x.scalar_type() && grad_y.device() == x.device(),
                    "grad_y must be as x is");
    STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Float && saved.is_contiguous() && saved.device() == x.device() &&
                        saved.numel() == saved_floats(shape, norm),
                    "saved must come from cbam_native with the same arguments");
  }
};

// Which gradients the backward op computes.
struct CbamNeeds {
  bool x;
  bool mlp;  // reduce_weight to expand_bias
  bool spatial_weight;
  bool norm;     // norm_weight and norm_bias
  bool moments;  // given ones, mean and var
};

// The gradients of x and the weights; of x, the weights, mean and var.
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using TenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A float32 tensor for each gradient that is needed, and an empty one for the others; x's has x's dtype.
struct CbamGradientTensors {
  CbamNeeds needs;
  Tensor x, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight, norm_weight, norm_bias, mean, var;

  CbamGradientTensors(const CbamShape& s, const Tensor& like, const CbamNeeds& needs)
      : needs(needs), x(needs.x ? empty_channels_last(like, s.c, s.h, s.w) : new_floats(like, {0})),
        reduce_weight(floats(like, needs.mlp, {s.r, s.c})), reduce_bias(floats(like, needs.mlp, {s.r})),
        expand_weight(floats(like, needs.mlp, {s.c, s.r})), expand_bias(floats(like, needs.mlp, {s.c})),
        spatial_weight(floats(like, needs.spatial_weight, {1, 2, s.k, s.k})),
        norm_weight(floats(like, needs.norm, {1})), norm_bias(floats(like, needs.norm, {1})),
        mean(floats(like, needs.moments, {1})), var(floats(like, needs.moments, {1})) {}

  static Tensor floats(const Tensor& like, bool needed, const std::vector<int64_t>& sizes) {
    return new_floats(like, needed ? sizes : std::vector<int64_t>{0});
  }

  CbamGradients pointers() const {
    const auto to = [](bool needed, const Tensor& t) { return needed ? t.mutable_data_ptr<float>() : nullptr; };
    return CbamGradients({needs.x ? x.mutable_data_ptr() : nullptr, to(needs.mlp, reduce_weight),
                          to(needs.mlp, reduce_bias), to(needs.mlp, expand_weight), to(needs.mlp, expand_bias),
                          to(needs.spatial_weight, spatial_weight), to(needs.norm, norm_weight),
                          to(needs.norm, norm_bias), to(needs.moments, mean), to(needs.moments, var)});
  }

  // In the dtypes of the tensors whose gradients they are.
  EightTensors x_and_weights(const CbamInputs& in) const {
    const auto as = [](const Tensor& gradient, const Tensor& t) { return as_dtype(gradient, t.scalar_type()); };
    return EightTensors(x, as(reduce_weight, in.reduce_weight), as(reduce_bias, in.reduce_bias),
                        as(expand_weight, in.expand_weight), as(expand_bias, in.expand_bias),
                        as(spatial_weight, in.spatial_weight), as(norm_weight, in.norm_weight),
                        as(norm_bias, in.norm_bias));
  }
  TenTensors all(const CbamInputs& in) const {
    const auto as = [](const Tensor& gradient, const Optional& t) {
      return t ? as_dtype(gradient, t->scalar_type()) : gradient;
    };
    return std::tuple_cat(x_and_weights(in), std::make_tuple(as(mean, in.mean), as(var, in.var)));
  }
};

struct CbamForwardOutputs {
  const Tensor &y, &mean, &var, &saved;
};

// What the backward pass is given beside the arguments of all passes.
struct CbamBackwardInputs {
  const Tensor &grad_y, &x, &saved;
  const float *grad_mean, *grad_var;  // or null
};

// The ops. Device: where a pass runs.
template <class Device>
FourTensors cbam(const Tensor& x, const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& expand_weight,
                 const Tensor& expand_bias, const Tensor& spatial_weight, const Tensor& norm_weight,
                 const Tensor& norm_bias, const Optional& mean, const Optional& var, bool batch, double eps) {
  const Device device(x);
  const CbamCall call({x, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight, norm_weight,
                       norm_bias, mean, var, batch, eps});
  const CbamShape& s = call.shape;
  const Tensor y = empty_channels_last(x, s.c, s.h, s.w), saved = new_floats(x, {saved_floats(s, call.norm)});
  const Tensor own_mean = new_floats(x, call.own_moments()), own_var = new_floats(x, call.own_moments());
  device.forward(call, x, {y, own_mean, own_var, saved});
  return {y, own_mean, own_var, saved};
}

template <class Device>
TenTensors cbam_backward(const Tensor& grad_y, const Optional& grad_mean, const Optional& grad_var, const Tensor& x,
                         const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& expand_weight,
                         const Tensor& expand_bias, const Tensor& spatial_weight, const Tensor& norm_weight,
                         const Tensor& norm_bias, const Optional& mean, const Optional& var, bool batch, double eps,
                         const Tensor& saved, bool needs_x, bool needs_mlp, bool needs_spatial_weight, bool needs_norm,
                         bool needs_moments) {
  const Device device(x);
  const CbamInputs in({x, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight, norm_weight,
                       norm_bias, mean, var, batch, eps});
  const CbamCall call(in);
  call.check_backward(grad_y, x, saved);
  const Optional to_mean = in_float32(grad_mean, x, call.own_moments(), "grad_mean");
  const Optional to_var = in_float32(grad_var, x, call.own_moments(), "grad_var");
  const CbamGradientTensors found(
      call.shape, x, {needs_x, needs_mlp, needs_spatial_weight, needs_norm, needs_moments && call.fixed()});
  device.backward(call, {grad_y, x, saved, data_of(to_mean), data_of(to_var)}, found);
  return found.all(in);
}
}  // namespace raccgan
