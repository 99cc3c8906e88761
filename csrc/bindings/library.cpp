// The schemas of all ops, and what is in this library, for raccgan.doctor and the tests.
#include <sstream>
#include <string>
#include <utility>
#include "../cpu/simd/targets.h"
#include "common.h"

namespace raccgan { namespace {
#ifndef RACCGAN_CUDA  // the toolkit's version
#define RACCGAN_CUDA ""
#define RACCGAN_CUDA_ARCHITECTURES ""
#endif
#ifndef RACCGAN_WHY_NO_CUDA
#define RACCGAN_WHY_NO_CUDA ""
#endif

std::string native_build() {
  std::ostringstream json;
  const char* separator = "";
  json << "{\"cpu_targets\": [";
#define RACCGAN_APPEND(target, unused) json << std::exchange(separator, ", ") << '"' << #target << '"';
  RACCGAN_FOR_EACH_TARGET(RACCGAN_APPEND, )
#undef RACCGAN_APPEND
  json << "], \"cpu_capability\": \"" << name_of(chosen_target()) << "\", \"cuda\": \"" << RACCGAN_CUDA
       << "\", \"cuda_architectures\": \"" << RACCGAN_CUDA_ARCHITECTURES << "\", \"why_no_cuda\": \""
       << RACCGAN_WHY_NO_CUDA << "\"}";
  return json.str();
}
}}  // namespace raccgan

#define RACCGAN_CBAM                                                                               \
  "Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, " \
  "Tensor spatial_weight, Tensor norm_weight, Tensor norm_bias"
#define RACCGAN_LAYER "Tensor x, Tensor w, Tensor? scale, Tensor? shift, " RACCGAN_OPTIONS
#define RACCGAN_OPTIONS "int upsample, int pool, bool pre_relu, bool normalise, bool relu, float eps"

STABLE_TORCH_LIBRARY(raccgan, m) {
  // JSON: cpu_targets and cpu_capability (the one in use), the CUDA toolkit's version or "", the GPU
  // architectures, and why there is no CUDA part or "".
  m.def("native_build() -> str");
  m.def(
      "anomaly_score_native(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, bool needs_map)"
      " -> (Tensor residual, Tensor feature, Tensor map)");
  m.def("cbam_native(" RACCGAN_CBAM
        ", Tensor? mean, Tensor? var, bool batch, float eps) -> (Tensor y, Tensor mean, Tensor var, Tensor saved)");
  m.def("cbam_native_backward(Tensor grad_y, Tensor? grad_mean, Tensor? grad_var, " RACCGAN_CBAM
        ", Tensor? mean, Tensor? var, bool batch, float eps, Tensor saved, bool needs_x, bool needs_mlp,"
        " bool needs_spatial_weight, bool needs_norm, bool needs_moments) -> (" RACCGAN_CBAM
        ", Tensor mean, Tensor var)");
  m.def("cbam_native_double_backward(Tensor grad_grad_x, Tensor grad_y, " RACCGAN_CBAM
        ", float eps, Tensor saved) -> (Tensor grad_y, " RACCGAN_CBAM ")");
  m.def("depthwise_native(" RACCGAN_LAYER ") -> Tensor");
  m.def("depthwise_native_backward(Tensor g, " RACCGAN_LAYER
        ", bool needs_x, bool needs_w, bool needs_affine) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise_native_double_backward(Tensor t, Tensor g, " RACCGAN_LAYER
        ", bool needs_g, bool needs_x, bool needs_w, bool needs_scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(  // on a GPU alone
      "depthwise_native_fused(Tensor x, Tensor w, Tensor pointwise, Tensor? bias, Tensor? scale, Tensor? shift, "
      "Tensor? residual, " RACCGAN_OPTIONS ", bool tf32) -> Tensor");
  m.def(  // on a CPU alone, like the pointwise ops
      "depthwise_separable_native(Tensor x, Tensor w, Tensor? bias, Tensor pointwise, Tensor? pointwise_bias, "
      "Tensor? scale, Tensor? shift, Tensor? residual, Tensor? packed, " RACCGAN_OPTIONS ") -> Tensor");
  m.def("moments_native(Tensor x) -> (Tensor, Tensor)");
  m.def("moments_native_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor");
  m.def("pointwise_native(Tensor x, Tensor w, Tensor? bias, Tensor? residual, Tensor? packed=None) -> Tensor");
  m.def("pointwise_native_packed(Tensor w, bool halves) -> Tensor");
  m.def("pointwise_native_product(Tensor x, Tensor g, bool needs_sums) -> (Tensor, Tensor)");
  m.def("pointwise_native_transposed(Tensor g, Tensor w) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CompositeExplicitAutograd, m) {
  m.impl("native_build", TORCH_BOX(&raccgan::native_build));
}
