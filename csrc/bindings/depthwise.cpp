// The bindings of the depthwise convolution and its correlation.
#include <torch/headeronly/core/MemoryFormat.h>

#include <memory>
#include <new>
#include <string>

#include "../cpu/depthwise.h"
#include "common.h"

namespace raccgan {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, kAlignment); }
};

std::unique_ptr<float[], Free> floats(int64_t count) {
  return std::unique_ptr<float[], Free>(new (kAlignment) float[count]);
}

Tensor channels_last(const Tensor& t) {
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

DepthwiseShape shape_of(const Tensor& x, int64_t k) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "x must be float32 or bfloat16");
  STD_TORCH_CHECK(k == 3 || k == 5 || k == 7, "the kernel size must be 3, 5 or 7, got ", k);
  return {x.size(0), x.size(1), x.size(2), x.size(3), k, dtype_of(x, "x")};
}

// Runs work(scratch, begin, end) over the tasks, each of about `products` multiplications.
template <class Work>
void run(const DepthwiseShape& shape, int64_t tasks, const Work& work) {
  const int64_t elements = shape.n * shape.c * shape.h * shape.w;
  share_out(tasks, elements / tasks * shape.k, [&](int64_t begin, int64_t end) {
    const auto scratch = floats(scratch_floats(shape));
    work(scratch.get(), begin, end);
  });
}

Tensor depthwise_cpu(const Tensor& x_in, const Tensor& w_in, const std::optional<Tensor>& b_in) {
  STD_TORCH_CHECK(w_in.dim() == 4, "w must be [C, 1, k, k]");
  const DepthwiseShape shape = shape_of(x_in, w_in.size(3));
  STD_TORCH_CHECK(w_in.size(0) == shape.c && w_in.size(1) == 1 && w_in.size(2) == shape.k, "w must be [C, 1, k, k]");
  STD_TORCH_CHECK(w_in.scalar_type() == x_in.scalar_type(), "x and w must be of one dtype");
  STD_TORCH_CHECK(!b_in || (b_in->dim() == 1 && b_in->size(0) == shape.c), "b must be [C]");
  STD_TORCH_CHECK(!b_in || b_in->scalar_type() == x_in.scalar_type(), "x and b must be of one dtype");
  STD_TORCH_CHECK(w_in.device() == x_in.device() && (!b_in || b_in->device() == x_in.device()),
                  "x, w and b must be on one device");

  const Tensor y = torch::stable::empty({shape.n, shape.c, shape.h, shape.w}, x_in.scalar_type(), std::nullopt,
                                        x_in.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  const Tensor x = channels_last(x_in), w = torch::stable::contiguous(w_in);
  const std::optional<Tensor> b = b_in ? std::optional(torch::stable::contiguous(*b_in)) : std::nullopt;
  const auto packed = floats(RACCGAN_SELECT(packed_floats)(shape));
  RACCGAN_SELECT(pack_weights)(shape, w.const_data_ptr(), b ? b->const_data_ptr() : nullptr, packed.get());
  const ConvolutionArgs args{shape, x.const_data_ptr(), packed.get(), y.mutable_data_ptr()};
  const auto convolve = RACCGAN_SELECT(convolve);
  run(shape, RACCGAN_SELECT(convolution_tasks)(shape),
      [&](float* scratch, int64_t begin, int64_t end) { convolve(args, scratch, begin, end); });
  return y;
}

// sum[c, i] = partial[0, i, c] + partial[1, i, c] + ..., in float64 and in that order.
void add_up(const float* partial, int64_t pieces, int64_t size, int64_t channels, float* sum) {
  std::vector<double> row(channels);
  for (int64_t i = 0; i < size; ++i) {
    std::fill(row.begin(), row.end(), 0.0);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const float* const from = partial + (piece * size + i) * channels;
      for (int64_t c = 0; c < channels; ++c) row[c] += from[c];
    }
    for (int64_t c = 0; c < channels; ++c) sum[c * size + i] = static_cast<float>(row[c]);
  }
}

Tensor depthwise_correlation_cpu(const Tensor& x_in, const Tensor& g_in, int64_t k) {
  const DepthwiseShape shape = shape_of(x_in, k);
  STD_TORCH_CHECK(g_in.dim() == 4 && same_sizes(x_in, g_in), "x and g must be [N, C, H, W] alike");
  STD_TORCH_CHECK(g_in.scalar_type() == x_in.scalar_type(), "x and g must be of one dtype");
  STD_TORCH_CHECK(g_in.device() == x_in.device(), "x and g must be on one device");

  const int64_t size = k * k;
  const Tensor sum = torch::stable::new_empty(x_in, {shape.c, 1, k, k}, ScalarType::Float);
  if (x_in.numel() == 0) {
    std::fill_n(sum.mutable_data_ptr<float>(), sum.numel(), 0.0f);
  } else {
    const Tensor x = channels_last(x_in), g = channels_last(g_in);
    const auto partial = floats(correlation_pieces(shape) * size * shape.c);
    const CorrelationArgs args{shape, x.const_data_ptr(), g.const_data_ptr(), partial.get()};
    const auto correlate = RACCGAN_SELECT(correlate);
    run(shape, RACCGAN_SELECT(correlation_tasks)(shape),
        [&](float* scratch, int64_t begin, int64_t end) { correlate(args, scratch, begin, end); });
    add_up(partial.get(), correlation_pieces(shape), size, shape.c, sum.mutable_data_ptr<float>());
  }
  return shape.dtype == Dtype::kFloat32 ? sum : torch::stable::to(sum, x_in.scalar_type());
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def("depthwise_native(Tensor x, Tensor w, Tensor? b) -> Tensor");
  m.def("depthwise_correlation_native(Tensor x, Tensor g, int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise_cpu));
  m.impl("depthwise_correlation_native", TORCH_BOX(&raccgan::depthwise_correlation_cpu));
}
