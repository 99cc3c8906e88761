// The CUDA bindings of CBAM; the schemas are in cbam.cpp.
#if defined(RACCGAN_CUDA) || defined(RACCGAN_EMULATION)

#include <array>
#include <tuple>

#include "../cuda/cbam.h"
#include "cuda.h"

namespace raccgan {
namespace {

using Optional = std::optional<Tensor>;

constexpr const char* kOp = "cbam";

Tensor new_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// ---- arguments ----------------------------------------------------------------------------------------------------

Tensor in_float32(const Tensor& t, const Tensor& x, const std::vector<int64_t>& sizes, const char* name) {
  const auto actual = t.sizes();
  STD_TORCH_CHECK(std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end()), name, " has the wrong shape");
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on x's device");
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
}

Optional in_float32(const Optional& t, const Tensor& x, const std::vector<int64_t>& sizes, const char* name) {
  if (!t) return std::nullopt;
  return in_float32(*t, x, sizes, name);
}

const float* data_of(const Optional& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// What the forward and the backward op are given alike, checked, everything but x in float32.
struct Given {
  Tensor x;
  cuda::CbamShape shape;
  Optional average, maximum;
  Tensor reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight, norm_weight, norm_bias;
  Optional mean, var;
  bool batch;
  float eps;

  Given(const Tensor& x_in, const Optional& average, const Optional& maximum, const Tensor& reduce_weight,
        const Tensor& reduce_bias, const Tensor& expand_weight, const Tensor& expand_bias,
        const Tensor& spatial_weight, const Tensor& norm_weight, const Tensor& norm_bias, const Optional& mean,
        const Optional& var, bool batch, double eps)
      : x(x_in),
        shape(shape_of(x, reduce_weight, spatial_weight)),
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
    x = channels_last(x);
  }

  static cuda::CbamShape shape_of(const Tensor& x, const Tensor& reduce_weight, const Tensor& spatial_weight) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "x must have a channel and a pixel at least");
    STD_TORCH_CHECK(reduce_weight.dim() == 2, "reduce_weight must be [R, C]");
    STD_TORCH_CHECK(spatial_weight.dim() == 4 && spatial_weight.size(3) % 2 == 1,
                    "spatial_weight must be [1, 2, k, k] with odd k");
    return {x.size(0), x.size(1), x.size(2), x.size(3), reduce_weight.size(0), spatial_weight.size(3),
            dtype_of(x, "x")};
  }

  cuda::CbamWeights weights() const {
    const auto of = [](const Tensor& t) { return t.const_data_ptr<float>(); };
    return {of(reduce_weight),  of(reduce_bias), of(expand_weight), of(expand_bias),
            of(spatial_weight), of(norm_weight), of(norm_bias),     eps};
  }

  cuda::CbamGiven instead() const { return {data_of(average), data_of(maximum), data_of(mean), data_of(var)}; }
  int64_t moments() const { return batch || mean ? 1 : shape.n; }
  int64_t saved_floats() const {
    return shape.n * (3 * shape.c + 3 * shape.r + 3 * shape.pixels()) + 2 * moments();
  }
};

// ---- forward ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> cbam_cuda(
    const Tensor& x, const Optional& average, const Optional& maximum, const Tensor& reduce_weight,
    const Tensor& reduce_bias, const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight,
    const Tensor& norm_weight, const Tensor& norm_bias, const Optional& mean, const Optional& var, bool batch,
    double eps) {
  const OnDevice device(x);
  const Given given(x, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                    norm_weight, norm_bias, mean, var, batch, eps);
  const cuda::CbamShape& s = given.shape;
  const Tensor y = empty_channels_last(x, s.c, s.h, s.w), saved = new_floats(x, {given.saved_floats()});
  const std::vector<int64_t> moments{mean ? 0 : given.moments()};
  const Tensor own_mean = new_floats(x, moments), own_var = new_floats(x, moments);
  const cuda::CbamForwardArgs args{s, given.weights(), given.instead(),
                                   cuda::CbamSaved(s, saved.mutable_data_ptr<float>()), batch,
                                   given.x.const_data_ptr(), y.mutable_data_ptr(), own_mean.mutable_data_ptr<float>(),
                                   own_var.mutable_data_ptr<float>()};
  const Tensor scratch = scratch_like(x, cuda::cbam_forward_floats(args));
  check_launch(cuda::cbam_forward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return {y, own_mean, own_var, saved};
}

// ---- backward -----------------------------------------------------------------------------------------------------

// The tensors of Given in its order, x first: bit i of `wanted` asks for the gradient of the i-th.
constexpr int kInputs = 12;
using Gradients = std::array<Tensor, kInputs>;

// A float32 tensor for each gradient that is wanted, and an empty one for the others; x's is of x's dtype.
Gradients new_gradients(const Given& given, int64_t wanted) {
  const cuda::CbamShape& s = given.shape;
  const std::vector<int64_t> sizes[kInputs] = {{}, {s.n, s.c}, {s.n, s.c}, {s.r, s.c}, {s.r}, {s.c, s.r}, {s.c},
                                               {1, 2, s.k, s.k}, {1}, {1}, {1}, {1}};
  const auto made = [&](int i) {
    if (!(wanted >> i & 1)) return new_floats(given.x, {0});
    return i == 0 ? empty_channels_last(given.x, s.c, s.h, s.w) : new_floats(given.x, sizes[i]);
  };
  return {made(0), made(1), made(2), made(3), made(4), made(5), made(6), made(7), made(8), made(9), made(10), made(11)};
}

using TwelveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor>;

TwelveTensors cbam_backward_cuda(
    const Tensor& g_y_in, const Optional& g_mean_in, const Optional& g_var_in, const Tensor& x,
    const Optional& average, const Optional& maximum, const Tensor& reduce_weight, const Tensor& reduce_bias,
    const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight, const Tensor& norm_weight,
    const Tensor& norm_bias, const Optional& mean, const Optional& var, bool batch, double eps, const Tensor& saved,
    int64_t wanted) {
  const OnDevice device(x);
  const Given given(x, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                    norm_weight, norm_bias, mean, var, batch, eps);
  STD_TORCH_CHECK(same_sizes(g_y_in, x) && g_y_in.scalar_type() == x.scalar_type() && g_y_in.device() == x.device(),
                  "g_y must be as x is");
  STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Float && saved.is_contiguous() && saved.device() == x.device() &&
                      saved.numel() == given.saved_floats(),
                  "saved must come from cbam_native with the same arguments");
  const std::vector<int64_t> moments{mean ? 0 : given.moments()};
  const Optional g_mean = in_float32(g_mean_in, x, moments, "g_mean");
  const Optional g_var = in_float32(g_var_in, x, moments, "g_var");
  const Tensor g_y = channels_last(g_y_in);
  const Gradients g = new_gradients(given, wanted);
  const auto to = [&](int i) { return wanted >> i & 1 ? g[i].mutable_data_ptr<float>() : nullptr; };
  const cuda::CbamSaved found(given.shape, const_cast<float*>(saved.const_data_ptr<float>()));
  const cuda::CbamBackwardArgs args{
      given.shape, given.weights(), given.instead(), found, batch, given.x.const_data_ptr(), g_y.const_data_ptr(),
      data_of(g_mean), data_of(g_var), wanted & 1 ? g[0].mutable_data_ptr() : nullptr, to(1), to(2), to(3), to(4),
      to(5), to(6), to(7), to(8), to(9), to(10), to(11)};
  const Tensor scratch = scratch_like(x, cuda::cbam_backward_floats(args));
  check_launch(cuda::cbam_backward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  // Everything but x's gradient is made in float32.
  const auto as = [&](int i, const Tensor& t) { return torch::stable::to(g[i], t.scalar_type()); };
  const auto as_given = [&](int i, const Optional& t) { return t ? as(i, *t) : g[i]; };
  return {g[0],
          as_given(1, average),
          as_given(2, maximum),
          as(3, reduce_weight),
          as(4, reduce_bias),
          as(5, expand_weight),
          as(6, expand_bias),
          as(7, spatial_weight),
          as(8, norm_weight),
          as(9, norm_bias),
          as_given(10, mean),
          as_given(11, var)};
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("cbam_native", TORCH_BOX(&raccgan::cbam_cuda));
  m.impl("cbam_native_backward", TORCH_BOX(&raccgan::cbam_backward_cuda));
}

#endif
