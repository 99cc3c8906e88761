// The anomaly score's binding of the CUDA kernels; the schema is in anomaly_score.cpp.
#ifdef RACCGAN_CUDA

#include "../cuda/anomaly_score.h"
#include "anomaly_score.h"
#include "cuda.h"

namespace raccgan { namespace {
std::tuple<Tensor, Tensor, Tensor> anomaly_score_cuda(const Tensor& x, const Tensor& x_hat, const Optional& f,
                                                      const Optional& f_hat, bool needs_map) {
  const OnDevice device(x);
  const AnomalyScore call(x, x_hat, f, f_hat, needs_map, cuda::kMaxChannelsLast);
  const int64_t n = x.size(0), pixels = x.size(2) * x.size(3), elements = call.elements();
  const int64_t image_chunks = chunks(pixels, cuda::kImageChunk);
  const int64_t feature_chunks = chunks(elements, cuda::kFeatureChunk);
  const Tensor partial = torch::stable::new_empty(x, {n * (image_chunks + feature_chunks)}, ScalarType::Double);
  double* const sums = partial.mutable_data_ptr<double>();
  const ImageArgs images = call.image_args(sums);
  FeatureArgs features{};
  if (f) features = call.feature_args(sums + n * image_chunks);
  const char* const error =
      cuda::anomaly_score(n, images, f ? &features : nullptr, call.residual.mutable_data_ptr<float>(),
                          call.feature.mutable_data_ptr<float>(), device.index(), device.stream());
  check_launch(error, "anomaly_score");
  return call.outputs();
}
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_IMPL(raccgan, RACCGAN_CUDA_KEY, m) {
  m.impl("anomaly_score_native", TORCH_BOX(&raccgan::anomaly_score_cuda));
}

#endif
