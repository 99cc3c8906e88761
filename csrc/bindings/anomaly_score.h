// The anomaly score: its arguments, checked and laid out.
#pragma once

#include <utility>
#include "../ops/anomaly_score.h"
#include "common.h"

namespace raccgan {
// Whether a sample's elements lie side by side without gaps, in some order of its dimensions.
inline bool dense_sample(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> layout;  // (stride, size)
  for (int64_t d = 1; d < t.dim(); ++d) {
    if (t.size(d) != 1) layout.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(layout.begin(), layout.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : layout) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 1; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Whether every image is [C, pixels] in memory, or [pixels, C] where channels_last is set.
inline bool has_layout(const Tensor& x, bool channels_last) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const auto is = [&](int64_t d, int64_t stride) { return x.size(d) == 1 || x.stride(d) == stride; };
  return channels_last ? is(1, 1) && is(3, c) && is(2, c * w) : is(3, 1) && is(2, w) && is(1, h * w);
}

inline ComparedTensors compared(const Tensor& a, const Tensor& b, const char* what) {
  return {a.const_data_ptr(), b.const_data_ptr(), a.stride(0), b.stride(0), dtype_of(a, what)};
}

inline void check_scored(const Tensor& x, const Tensor& x_hat, const Optional& f, const Optional& f_hat) {
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

template <class Device>
std::tuple<Tensor, Tensor, Tensor> anomaly_score(const Tensor& x_in, const Tensor& x_hat_in, const Optional& f_in,
                                                 const Optional& f_hat_in, bool needs_map) {
  const Device device(x_in);
  check_scored(x_in, x_hat_in, f_in, f_hat_in);
  Tensor x = x_in, x_hat = x_hat_in;
  const int64_t n = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  bool channels_last = false;
  if (!has_layout(x, false) || !has_layout(x_hat, false)) {
    channels_last =
        channels > 0 && channels <= Device::kMostChannelsLast && has_layout(x, true) && has_layout(x_hat, true);
    if (!channels_last) x = dense(x), x_hat = dense(x_hat);
  }
  Optional f = f_in, f_hat = f_hat_in;
  if (f && !(same_strides(*f, *f_hat) && dense_sample(*f))) f = dense(*f), f_hat = dense(*f_hat);

  const Tensor residual = new_floats(x, {n}), feature = new_floats(x, {n});
  const Tensor map = new_floats(x, needs_map ? std::vector<int64_t>{n, x.size(2), x.size(3)} : std::vector<int64_t>{0});
  const int64_t elements = f && n != 0 ? f->numel() / n : 0;
  const ImageArgs images{compared(x, x_hat, "x"), channels, pixels, channels_last, floats_of(map), nullptr};
  FeatureArgs features{};
  if (f) features = {compared(*f, *f_hat, "f"), elements, nullptr};
  device.anomaly_score(n, images, f ? &features : nullptr, residual.mutable_data_ptr<float>(),
                       feature.mutable_data_ptr<float>());
  return {residual, feature, map};
}
}  // namespace raccgan
