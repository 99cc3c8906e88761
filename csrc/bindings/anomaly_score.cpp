// The anomaly score's schema, and its binding of the CPU kernels.
#include "../cpu/anomaly_score.h"
#include "anomaly_score.h"

namespace raccgan { namespace {
// means[n] = (partial[n, 0] + partial[n, 1] + ...) / size, the sums in float64 and in that order.
void write_means(const std::vector<double>& partial, int64_t n, int64_t size, float* means) {
  const int64_t a_sample = n == 0 ? 0 : static_cast<int64_t>(partial.size()) / n;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t p = i * a_sample; p < (i + 1) * a_sample; ++p) sum += partial[p];
    means[i] = static_cast<float>(sum / static_cast<double>(size));
  }
}

std::tuple<Tensor, Tensor, Tensor> anomaly_score_cpu(const Tensor& x, const Tensor& x_hat, const Optional& f,
                                                     const Optional& f_hat, bool needs_map) {
  const AnomalyScore call(x, x_hat, f, f_hat, needs_map, kMaxChannelsLast);
  const int64_t n = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  std::vector<double> partial(n * chunks(pixels, kImageChunk));
  const ImageArgs images = call.image_args(partial.data());
  const auto image_chunks = RACCGAN_SELECT(image_chunks);
  share_out(static_cast<int64_t>(partial.size()), channels * std::min(pixels, kImageChunk),
            [&](int64_t begin, int64_t end) { image_chunks(images, begin, end); });
  write_means(partial, n, channels * pixels, call.residual.mutable_data_ptr<float>());

  if (!f) {
    std::fill_n(call.feature.mutable_data_ptr<float>(), n, 0.0f);
    return call.outputs();
  }
  const int64_t elements = call.elements();
  partial.assign(n * chunks(elements, kFeatureChunk), 0);
  const FeatureArgs features = call.feature_args(partial.data());
  const auto feature_chunks = RACCGAN_SELECT(feature_chunks);
  share_out(static_cast<int64_t>(partial.size()), std::min(elements, kFeatureChunk),
            [&](int64_t begin, int64_t end) { feature_chunks(features, begin, end); });
  write_means(partial, n, elements, call.feature.mutable_data_ptr<float>());
  return call.outputs();
}
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def(
      "anomaly_score_native(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, bool needs_map)"
      " -> (Tensor residual, Tensor feature, Tensor map)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) { m.impl("anomaly_score_native", TORCH_BOX(&raccgan::anomaly_score_cpu)); }
