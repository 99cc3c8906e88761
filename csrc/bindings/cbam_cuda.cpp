// The CUDA bindings of CBAM; the schemas are in cbam.cpp.
#ifdef RACCGAN_CUDA

#include "../cuda/cbam.h"
#include "cbam.h"
#include "cuda.h"

namespace raccgan {
namespace {

constexpr const char* kOp = "cbam";

const float* data_of(const Optional& t) { return t ? t->const_data_ptr<float>() : nullptr; }

struct Given : CbamGiven<cuda::CbamShape> {
  Tensor x;  // as the kernels read it

  template <class... Others>
  explicit Given(const Tensor& x, const Others&... others) : CbamGiven(x, others...), x(channels_last(x)) {}

  cuda::CbamWeights weights() const {
    const auto of = [](const Tensor& t) { return t.const_data_ptr<float>(); };
    return {of(reduce_weight),  of(reduce_bias), of(expand_weight), of(expand_bias),
            of(spatial_weight), of(norm_weight), of(norm_bias),     eps};
  }

  cuda::CbamGiven instead() const { return {data_of(average), data_of(maximum), data_of(mean), data_of(var)}; }
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
  const std::vector<int64_t> moments = given.own_moments();
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

TwelveTensors cbam_backward_cuda(
    const Tensor& g_y_in, const Optional& g_mean_in, const Optional& g_var_in, const Tensor& x,
    const Optional& average, const Optional& maximum, const Tensor& reduce_weight, const Tensor& reduce_bias,
    const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight, const Tensor& norm_weight,
    const Tensor& norm_bias, const Optional& mean, const Optional& var, bool batch, double eps, const Tensor& saved,
    int64_t wanted) {
  const OnDevice device(x);
  const Given given(x, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                    norm_weight, norm_bias, mean, var, batch, eps);
  given.check_backward(g_y_in, x, saved);
  const std::vector<int64_t> moments = given.own_moments();
  const Optional g_mean = in_float32(g_mean_in, x, moments, "g_mean");
  const Optional g_var = in_float32(g_var_in, x, moments, "g_var");
  const Tensor g_y = channels_last(g_y_in);
  const Gradients g = new_gradients(given.shape, x, wanted);
  const auto to = [&](int i) { return wanted >> i & 1 ? g[i].mutable_data_ptr<float>() : nullptr; };
  const cuda::CbamSaved found(given.shape, const_cast<float*>(saved.const_data_ptr<float>()));
  const cuda::CbamBackwardArgs args{
      given.shape, given.weights(), given.instead(), found, batch, given.x.const_data_ptr(), g_y.const_data_ptr(),
      data_of(g_mean), data_of(g_var), wanted & 1 ? g[0].mutable_data_ptr() : nullptr, to(1), to(2), to(3), to(4),
      to(5), to(6), to(7), to(8), to(9), to(10), to(11)};
  const Tensor scratch = scratch_like(x, cuda::cbam_backward_floats(args));
  check_launch(cuda::cbam_backward(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), kOp);
  return in_their_dtypes(g, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                         norm_weight, norm_bias, mean, var);
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("cbam_native", TORCH_BOX(&raccgan::cbam_cuda));
  m.impl("cbam_native_backward", TORCH_BOX(&raccgan::cbam_backward_cuda));
}

#endif
