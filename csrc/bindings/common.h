// Helpers of all bindings. An op's bindings are where its kernels meet PyTorch: schema, checks and outputs.
//
// LibTorch's stable ABI only, so that one library serves every PyTorch from 2.11 on and every Python. Gradients and
// shape inference are registered from Python, in kernels/<family>/native.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>
#include <algorithm>
#include <memory>
#include <new>
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

// t, of a dtype that CPU kernels can write.
inline const Tensor& float32_or_bfloat16(const Tensor& t, const char* what = "x") {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, what,
                  " must be float32 or bfloat16");
  return t;
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

// t, in the layout and of a dtype that CPU kernels read.
inline Tensor image(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.dim() == 4, what, " must be [N, C, H, W]");
  return channels_last(float32_or_bfloat16(t, what));
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

inline Tensor new_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// [n, c, h, w] of the dtype and device of `like`.
inline Tensor empty_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// The same for as many samples as `like` has.
inline Tensor empty_channels_last(const Tensor& like, int64_t c, int64_t h, int64_t w) {
  return empty_channels_last(like, like.size(0), c, h, w);
}

constexpr std::align_val_t kAlignment{64};  // of the widest vectors, and of a line of the caches

struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, kAlignment); }
};
using AlignedFloats = std::unique_ptr<float[], Free>;

inline AlignedFloats aligned_floats(int64_t count) { return AlignedFloats(new (kAlignment) float[count]); }

// Shares out `count` chunks of `elements` each. A thread pays from about as many elements on as PyTorch gives one in
// its own pointwise operations (at::internal::GRAIN_SIZE).
template <class Work> void share_out(int64_t count, int64_t elements, const Work& work) {
  constexpr int64_t kElementsAThread = 32768;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kElementsAThread / std::max<int64_t>(1, elements)), work);
}

// to[i] = partial[0, i] + partial[1, i] + ..., in float64 and in that order.
inline void add_up(const float* partial, int64_t count, int64_t size, float* to) {
  std::vector<double> sum(size);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < size; ++i) sum[i] += partial[j * size + i];
  }
  std::copy(sum.begin(), sum.end(), to);
}
}  // namespace raccgan
