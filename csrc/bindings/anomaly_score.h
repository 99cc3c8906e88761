// What the anomaly score's bindings of the CPU and of the CUDA kernels share: its arguments, checked and laid out.
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

// The checked inputs in a layout that the kernels read, and the outputs.
struct AnomalyScore {
  Tensor x, x_hat;
  Optional f, f_hat;
  bool channels_last;
  Tensor residual, feature, map;

  AnomalyScore(const Tensor& x, const Tensor& x_hat, const Optional& f, const Optional& f_hat, bool needs_map,
               int64_t max_channels_last)
      : x(x), x_hat(x_hat), f(f), f_hat(f_hat), channels_last(false) {
    check();
    lay_out(max_channels_last);
    residual = new_floats(x, {x.size(0)});
    feature = new_floats(x, {x.size(0)});
    map = new_floats(x, needs_map ? std::vector<int64_t>{x.size(0), x.size(2), x.size(3)} : std::vector<int64_t>{0});
  }

  void lay_out(int64_t max_channels_last) {
    if (!has_layout(x, false) || !has_layout(x_hat, false)) {
      const bool fits = x.size(1) > 0 && x.size(1) <= max_channels_last;
      channels_last = fits && has_layout(x, true) && has_layout(x_hat, true);
      if (!channels_last) x = dense(x), x_hat = dense(x_hat);
    }
    if (f && !(same_strides(*f, *f_hat) && dense_sample(*f))) f = dense(*f), f_hat = dense(*f_hat);
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
    float* const pixel_map = map.dim() == 3 ? map.mutable_data_ptr<float>() : nullptr;
    return {compared(x, x_hat, "x"), x.size(1), x.size(2) * x.size(3), channels_last, pixel_map, partial};
  }

  FeatureArgs feature_args(double* partial) const { return {compared(*f, *f_hat, "f"), elements(), partial}; }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {residual, feature, map}; }
};
}  // namespace raccgan
