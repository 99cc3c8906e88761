// The ops of CBAM: operands, checks and outputs.
#pragma once

#include <array>
#include "../ops/cbam.h"
#include "common.h"

namespace raccgan {
// reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight, norm_weight, norm_bias, mean and var; or the
// gradient of each.
using CbamParameters = std::array<Optional, 9>;
constexpr std::array kCbamNames{"reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "spatial_weight",
                                "norm_weight",   "norm_bias",   "mean",          "var"};

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using TenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Optional in_float32(const Optional& t, const Tensor& x, const std::vector<int64_t>& sizes, const char* name) {
  if (!t) return std::nullopt;
  const auto actual = t->sizes();
  STD_TORCH_CHECK(std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end()), name, " has the wrong shape");
  STD_TORCH_CHECK(t->device() == x.device(), name, " must be on x's device");
  return dense(as_dtype(*t, ScalarType::Float));
}

// The operands of every op, checked; all but x in float32.
struct CbamCall {
  const Tensor& x;
  const CbamParameters& given;
  CbamShape shape;
  CbamNorm norm;
  float eps;
  CbamParameters parameters;

  CbamCall(const Tensor& x, const CbamParameters& given, bool batch, double eps)
      : x(x), given(given), norm(given[7] ? CbamNorm::kFixed
                                 : batch  ? CbamNorm::kBatch
                                          : CbamNorm::kInstance),
        eps(static_cast<float>(eps)) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "x must have a channel and a pixel at least");
    STD_TORCH_CHECK(given[0]->dim() == 2, "reduce_weight must be [R, C]");
    STD_TORCH_CHECK(given[4]->dim() == 4 && given[4]->size(3) % 2 == 1,
                    "spatial_weight must be [1, 2, k, k] with odd k");
    shape = {x.size(0), x.size(1), x.size(2), x.size(3), given[0]->size(0), given[4]->size(3), dtype_of(x, "x")};
    for (size_t i = 0; i < given.size(); ++i) parameters[i] = in_float32(given[i], x, sizes(i), kCbamNames[i]);
    STD_TORCH_CHECK(given[7].has_value() == given[8].has_value(), "give both mean and var, or neither");
  }

  std::vector<int64_t> sizes(size_t parameter) const {
    const auto [n, c, h, w, r, k, dtype] = shape;
    switch (parameter) {
      case 0: return {r, c};
      case 1: return {r};
      case 2: return {c, r};
      case 3: return {c};
      case 4: return {1, 2, k, k};
      default: return {1};
    }
  }

  // How many moments the forward op returns: none where they were given.
  int64_t own_moments() const { return norm == CbamNorm::kFixed ? 0 : moments(shape, norm); }

  // The part of the kernels' arguments that every pass has.
  CbamArgs args(const Tensor& saved) const {
    const auto at = [&](int i) { return data_of(parameters[i]); };
    const CbamWeights weights{at(0), at(1), at(2), at(3), at(4), at(5), at(6), eps};
    return {shape, weights, saved_in(shape, const_cast<float*>(data_of(saved))), norm};
  }

  void check_backward(const Tensor& grad_y, const Tensor& saved) const {
    check_like_x(grad_y, "grad_y");
    STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Float && saved.is_contiguous() && saved.device() == x.device() &&
                        saved.numel() == saved_floats(shape, norm),
                    "saved must come from cbam_native with the same arguments");
  }

  void check_like_x(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(same_sizes(t, x) && t.scalar_type() == x.scalar_type() && t.device() == x.device(), name,
                    " must be as x is");
  }

  Tensor new_x() const { return empty_channels_last(x, shape.c, shape.h, shape.w); }
};

// Outputs for the gradients that are needed, without elements for the others: x's as x is, the others float32.
struct CbamGradientTensors {
  Tensor x;
  CbamParameters parameters;

  CbamGradientTensors(const CbamCall& call, bool needs_x, const std::array<bool, 9>& needed)
      : x(needs_x ? call.new_x() : new_floats(call.x, {0})) {
    for (size_t i = 0; i < needed.size(); ++i) {
      parameters[i] = new_floats(call.x, needed[i] ? call.sizes(i) : std::vector<int64_t>{0});
    }
  }

  CbamGradients pointers() const {
    const auto to = [&](int i) { return floats_of(*parameters[i]); };
    return {out_of(x), to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7), to(8)};
  }

  // Each in the dtype of the tensor whose gradient it is.
  TenTensors all(const CbamCall& call) const {
    const auto as = [&](int i) {
      const Tensor& gradient = *parameters[i];
      return call.given[i] ? as_dtype(gradient, call.given[i]->scalar_type()) : gradient;
    };
    return {x, as(0), as(1), as(2), as(3), as(4), as(5), as(6), as(7), as(8)};
  }
};

template <class Device>
FourTensors cbam(const Tensor& x_in, const Tensor& reduce_weight, const Tensor& reduce_bias,
                 const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight,
                 const Tensor& norm_weight, const Tensor& norm_bias, const Optional& mean, const Optional& var,
                 bool batch, double eps) {
  const Device device(x_in);
  Device::check_dtype(x_in, "x");
  const CbamParameters parameters{reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                                  norm_weight,   norm_bias,   mean,          var};
  const CbamCall call(x_in, parameters, batch, eps);
  const Tensor x = Device::readable(x_in), y = call.new_x(),
               saved = new_floats(x, {saved_floats(call.shape, call.norm)});
  const Tensor own_mean = new_floats(x, {call.own_moments()}), own_var = new_floats(x, {call.own_moments()});
  device.run("cbam", CbamForwardArgs{call.args(saved), data_of(call.parameters[7]), data_of(call.parameters[8]),
                                     x.const_data_ptr(), y.mutable_data_ptr(), own_mean.mutable_data_ptr<float>(),
                                     own_var.mutable_data_ptr<float>(), !is_channels_last(x)});
  return {y, own_mean, own_var, saved};
}

template <class Device>
TenTensors cbam_backward(const Tensor& grad_y_in, const Optional& grad_mean, const Optional& grad_var,
                         const Tensor& x_in, const Tensor& reduce_weight, const Tensor& reduce_bias,
                         const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight,
                         const Tensor& norm_weight, const Tensor& norm_bias, const Optional& mean, const Optional& var,
                         bool batch, double eps, const Tensor& saved, bool needs_x, bool needs_mlp,
                         bool needs_spatial_weight, bool needs_norm, bool needs_moments) {
  const Device device(x_in);
  Device::check_dtype(x_in, "x");
  const CbamParameters parameters{reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                                  norm_weight,   norm_bias,   mean,          var};
  const CbamCall call(x_in, parameters, batch, eps);
  call.check_backward(grad_y_in, saved);
  const Optional of_mean = in_float32(grad_mean, x_in, {call.own_moments()}, "grad_mean");
  const Optional of_var = in_float32(grad_var, x_in, {call.own_moments()}, "grad_var");
  const bool of_given = needs_moments && call.norm == CbamNorm::kFixed;
  const CbamGradientTensors found(call, needs_x,
                                  {needs_mlp, needs_mlp, needs_mlp, needs_mlp, needs_spatial_weight, needs_norm,
                                   needs_norm, of_given, of_given});
  const Tensor x = Device::readable(x_in), grad_y = Device::readable(grad_y_in);
  device.run("cbam",
             CbamBackwardArgs{call.args(saved), x.const_data_ptr(), grad_y.const_data_ptr(), data_of(of_mean),
                              data_of(of_var), found.pointers(), !is_channels_last(x), !is_channels_last(grad_y)});
  return found.all(call);
}
}  // namespace raccgan
