// The anomaly score's bindings.
#include <string>
#include <tuple>
#include <utility>

#include "../cpu/anomaly_score.h"
#include "common.h"
#ifdef RACCGAN_CUDA
#include "../cuda/anomaly_score.h"
#include "cuda.h"
#endif

namespace raccgan {
namespace {

Tensor empty_float(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// The dimensions of one sample with more than one element, as (stride, size), the innermost first.
std::vector<std::pair<int64_t, int64_t>> sample_layout(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> layout;
  for (int64_t d = 1; d < t.dim(); ++d) {
    if (t.size(d) != 1) layout.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(layout.begin(), layout.end());
  return layout;
}

// Whether a sample is one run of elements without gaps, in some order of its dimensions.
bool dense_sample(const Tensor& t) {
  int64_t expected = 1;
  for (const auto& [stride, size] : sample_layout(t)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 1; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Whether every image is [C, pixels] in memory, or [pixels, C] where channels_last is set.
bool has_layout(const Tensor& x, bool channels_last) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const auto is = [&](int64_t d, int64_t stride) { return x.size(d) == 1 || x.stride(d) == stride; };
  return channels_last ? is(1, 1) && is(3, c) && is(2, c * w) : is(3, 1) && is(2, w) && is(1, h * w);
}

ComparedTensors compared(const Tensor& a, const Tensor& b, const char* what) {
  return {a.const_data_ptr(), b.const_data_ptr(), a.stride(0), b.stride(0), dtype_of(a, what)};
}

// The checked inputs in a layout that the kernels read, and the outputs.
struct AnomalyScore {
  Tensor x, x_hat;
  std::optional<Tensor> f, f_hat;
  bool channels_last;
  Tensor residual, feature, map;

  AnomalyScore(const Tensor& x_in, const Tensor& x_hat_in, const std::optional<Tensor>& f_in,
               const std::optional<Tensor>& f_hat_in, bool needs_map, int64_t max_channels_last)
      : x(x_in), x_hat(x_hat_in), f(f_in), f_hat(f_hat_in) {
    check();
    channels_last = false;
    if (!has_layout(x, false) || !has_layout(x_hat, false)) {
      const bool fits = x.size(1) > 0 && x.size(1) <= max_channels_last;
      channels_last = fits && has_layout(x, true) && has_layout(x_hat, true);
      if (!channels_last) {
        x = dense(x);
        x_hat = dense(x_hat);
      }
    }
    if (f && !(same_strides(*f, *f_hat) && dense_sample(*f))) {
      f = dense(*f);
      f_hat = dense(*f_hat);
    }
    residual = empty_float(x, {x.size(0)});
    feature = empty_float(x, {x.size(0)});
    map = empty_float(x, needs_map ? std::vector<int64_t>{x.size(0), x.size(2), x.size(3)} : std::vector<int64_t>{0});
  }

  void check() const {
    STD_TORCH_CHECK(x.dim() == 4 && same_sizes(x, x_hat), "x and x_hat must be [N, C, H, W] alike");
    STD_TORCH_CHECK(x.scalar_type() == x_hat.scalar_type(), "x and x_hat must be of one dtype");
    STD_TORCH_CHECK(x.device() == x_hat.device(), "x and x_hat must be on one device");
    STD_TORCH_CHECK(f.has_value() == f_hat.has_value(), "give both f and f_hat, or neither");
    if (!f) return;
    STD_TORCH_CHECK(f->dim() >= 1 && f->size(0) == x.size(0) && same_sizes(*f, *f_hat),
                    "f and f_hat must be [N, ...] alike, N as in x");
    STD_TORCH_CHECK(f->scalar_type() == f_hat->scalar_type(), "f and f_hat must be of one dtype");
    STD_TORCH_CHECK(f->device() == x.device() && f_hat->device() == x.device(), "f and f_hat must be on x's device");
  }

  int64_t elements() const { return f && x.size(0) != 0 ? f->numel() / x.size(0) : 0; }  // of f, a sample

  ImageArgs image_args(double* partial) const {
    return {compared(x, x_hat, "x"), x.size(1), x.size(2) * x.size(3), channels_last,
            map.dim() == 3 ? map.mutable_data_ptr<float>() : nullptr, partial};
  }

  FeatureArgs feature_args(double* partial) const { return {compared(*f, *f_hat, "f"), elements(), partial}; }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {residual, feature, map}; }
};

// means[n] = (partial[n, 0] + partial[n, 1] + ...) / size, the sums in float64 and in that order.
void write_means(const std::vector<double>& partial, int64_t n, int64_t size, float* means) {
  const int64_t a_sample = n == 0 ? 0 : static_cast<int64_t>(partial.size()) / n;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t p = i * a_sample; p < (i + 1) * a_sample; ++p) sum += partial[p];
    means[i] = static_cast<float>(sum / static_cast<double>(size));
  }
}

std::tuple<Tensor, Tensor, Tensor> anomaly_score_cpu(const Tensor& x, const Tensor& x_hat,
                                                     const std::optional<Tensor>& f,
                                                     const std::optional<Tensor>& f_hat, bool needs_map) {
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

#ifdef RACCGAN_CUDA

std::tuple<Tensor, Tensor, Tensor> anomaly_score_cuda(const Tensor& x, const Tensor& x_hat,
                                                      const std::optional<Tensor>& f,
                                                      const std::optional<Tensor>& f_hat, bool needs_map) {
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
  const char* const error = cuda::anomaly_score(
      n, images, f ? &features : nullptr, call.residual.mutable_data_ptr<float>(),
      call.feature.mutable_data_ptr<float>(), device.index(), device.stream());
  check_launch(error, "anomaly_score");
  return call.outputs();
}

#endif

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def(
      "anomaly_score_native(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, bool needs_map)"
      " -> (Tensor residual, Tensor feature, Tensor map)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("anomaly_score_native", TORCH_BOX(&raccgan::anomaly_score_cpu));
}

#ifdef RACCGAN_CUDA
STABLE_TORCH_LIBRARY_IMPL(raccgan, CUDA, m) {
  m.impl("anomaly_score_native", TORCH_BOX(&raccgan::anomaly_score_cuda));
}
#endif
