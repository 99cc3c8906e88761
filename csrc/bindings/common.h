// Helpers of all bindings, where kernels meet PyTorch: checks and outputs. An op is a template here, by the device whose
// kernels it runs: library_cpu.cpp and library_cuda.cpp. Gradients and shapes are registered from Python.
//
// LibTorch's stable ABI only, so that one library serves every PyTorch from 2.11 on and every Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>
#include "../ops/dtype.h"

namespace raccgan {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline Dtype dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, what, " must be float32, bfloat16 or float16");
  }
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto sizes_a = a.sizes(), sizes_b = b.sizes();
  return std::equal(sizes_a.begin(), sizes_a.end(), sizes_b.begin(), sizes_b.end());
}

// The functions below check first whether there is anything to do: PyTorch's dispatcher takes one to two microseconds
// to find that out, and a layer of one small image some fifteen.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline bool is_channels_last(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3), strides[] = {c * h * w, 1, w * c, c};
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) != 1 && t.stride(d) != strides[d]) return false;
  }
  return true;
}

inline Tensor channels_last(const Tensor& t) {
  return is_channels_last(t) ? t : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

// t, in the layout and of a dtype that the device's kernels read and write.
template <class Device> Tensor image(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.dim() == 4, what, " must be [N, C, H, W]");
  Device::check_dtype(t, what);
  return channels_last(t);
}

// Of all images together.
inline int64_t pixels(const Tensor& t) { return t.size(0) * t.size(2) * t.size(3); }

// `count` numbers of float32 side by side; else `wrong` is said.
inline Tensor floats(const Tensor& t, int64_t count, const char* wrong) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count && t.scalar_type() == ScalarType::Float, wrong);
  return dense(t);
}

inline const float* data_of(const Tensor& t) { return t.const_data_ptr<float>(); }
inline const float* data_of(const Optional& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// Of an output: null where it has no elements, as one that is not needed.
inline void* out_of(const Tensor& t) { return t.numel() != 0 ? t.mutable_data_ptr() : nullptr; }
inline float* floats_of(const Tensor& t) { return static_cast<float*>(out_of(t)); }

inline Tensor new_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// [N, c, h, w] of the dtype and device of `like`, N as there.
inline Tensor empty_channels_last(const Tensor& like, int64_t c, int64_t h, int64_t w) {
  return torch::stable::empty({like.size(0), c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}
}  // namespace raccgan
