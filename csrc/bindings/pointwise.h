// A pointwise convolution, and its two gradients: matrix products of a CPU. See ../ops/pointwise.h.
#pragma once

#include "../cpu/kernels.h"
#include "common.h"

namespace raccgan {
// w [D, C, 1, 1]
inline Tensor matrix(const Tensor& w) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1, "w must be [D, C, 1, 1]");
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float, "w must be float32");
  return dense(w);
}

// y = x w^T, for M pixels x of the dtype.
inline ProductArgs product_with(const Tensor& w, int64_t m, Dtype dtype) {
  return {m, w.size(1), w.size(0), dtype, nullptr, w.const_data_ptr<float>(), true};
}

// Header of packed weights: their shape, target and dtype. As long as a cache line, to which the weights are aligned.
struct Header {
  int64_t rows, columns;
  Target target;
  Dtype dtype;

  explicit Header(const ProductArgs& args)
      : rows(args.n), columns(args.k), target(chosen_target()), dtype(args.dtype) {}
  bool operator==(const Header&) const = default;
};
constexpr int64_t kHeaderFloats = 16;
static_assert(sizeof(Header) <= kHeaderFloats * sizeof(float));

// w for many calls with images of one dtype: a header, and the weights in the order of the kernels.
inline Tensor pointwise_packed(const Tensor& w_in, bool halves) {
  const Tensor w = matrix(w_in);
  const ProductArgs args = product_with(w, 0, halves ? Dtype::kBFloat16 : Dtype::kFloat32);
  const Header header(args);
  Tensor packed = new_floats(w, {kHeaderFloats + RACCGAN_SELECT(packed_factor)(args)});
  float* const to = packed.mutable_data_ptr<float>();
  std::fill_n(to, kHeaderFloats, 0.0f);
  memcpy(to, &header, sizeof header);
  if (packed.numel() > kHeaderFloats) RACCGAN_SELECT(pack_factor)(args, to + kHeaderFloats);
  return packed;
}

// The weights in such a tensor; null where they need no packing, or the header says that they are for another dtype or
// processor, as in a model that was moved.
inline const float* packed_in(const Tensor& packed, const ProductArgs& args) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 1 && packed.is_contiguous() &&
                      packed.numel() >= kHeaderFloats,
                  "packed must be what pointwise_native_packed returned");
  const Header expected(args);
  Header found = expected;
  memcpy(&found, packed.const_data_ptr(), sizeof found);
  if (!(found == expected)) return nullptr;
  const int64_t count = RACCGAN_SELECT(packed_factor)(args);
  STD_TORCH_CHECK(packed.numel() == kHeaderFloats + count, "packed is not as its header says");
  return count == 0 ? nullptr : data_of(packed) + kHeaderFloats;
}

// y[n, d, h, v] = bias[d] + residual[n, d, h, v] + sum over c of x[n, c, h, v] w[d, c], with all operands but x checked.
struct PointwiseCall {
  Tensor w, y;
  Optional bias, residual;
  ProductArgs args;  // `a`, which is x [n, c, h, v], is not set

  // `like` is any image with x's dtype and number of samples.
  PointwiseCall(const Tensor& like, int64_t c, int64_t h, int64_t v, const Tensor& w_in, const Optional& bias_in,
                const Optional& residual_in, const Optional& packed)
      : w(matrix(w_in)), y(empty_channels_last(like, w.size(0), h, v)),
        args(product_with(w, pixels(y), dtype_of(y, "x"))) {
    STD_TORCH_CHECK(c == w.size(1), "x must have as many channels as w has columns, ", w.size(1));
    if (bias_in) bias = floats(*bias_in, w.size(0), "the bias must be float32 [D]");
    if (residual_in) {
      STD_TORCH_CHECK(residual_in->dim() == 4 && same_sizes(*residual_in, y), "the residual must be [N, D, H, W]");
      STD_TORCH_CHECK(residual_in->scalar_type() == y.scalar_type(), "x and the residual must be of one dtype");
      residual = channels_last(*residual_in);
      args.residual = residual->const_data_ptr();
    }
    args.out = y.mutable_data_ptr();
    args.packed = packed ? packed_in(*packed, args) : nullptr;
    args.bias = data_of(bias);
  }
};

template <class Device>
Tensor pointwise(const Tensor& x_in, const Tensor& w, const Optional& bias, const Optional& residual,
                 const Optional& packed) {
  const Tensor x = image<Device>(x_in, "x");
  PointwiseCall call(x, x.size(1), x.size(2), x.size(3), w, bias, residual, packed);
  call.args.a = x.const_data_ptr();
  RACCGAN_SELECT(product)(call.args);
  return call.y;
}

template <class Device> Tensor pointwise_transposed(const Tensor& g_in, const Tensor& w_in) {
  const Tensor g = image<Device>(g_in, "g"), w = matrix(w_in);
  const Tensor x = empty_channels_last(g, w.size(1), g.size(2), g.size(3));
  STD_TORCH_CHECK(g.size(1) == w.size(0), "g must have as many channels as w has rows, ", w.size(0));
  RACCGAN_SELECT(product)({pixels(g), w.size(0), w.size(1), dtype_of(g, "g"), g.const_data_ptr(), data_of(w), false,
                           nullptr, nullptr, nullptr, x.mutable_data_ptr()});
  return x;
}

template <class Device>
std::tuple<Tensor, Tensor> pointwise_product(const Tensor& x_in, const Tensor& g_in, bool needs_sums) {
  const Tensor x = image<Device>(x_in, "x"), g = image<Device>(g_in, "g");
  STD_TORCH_CHECK(x.size(0) == g.size(0) && x.size(2) == g.size(2) && x.size(3) == g.size(3),
                  "x and g must be of as many images, and of one size");
  STD_TORCH_CHECK(x.scalar_type() == g.scalar_type(), "x and g must be of one dtype");
  const int64_t c = x.size(1), d = g.size(1);
  const Tensor w = new_floats(x, {d, c, 1, 1}), sums = new_floats(x, {needs_sums ? d : 0});
  RACCGAN_SELECT(correlation)({pixels(x), d, c, dtype_of(x, "x"), g.const_data_ptr(), x.const_data_ptr(),
                               w.mutable_data_ptr<float>(), floats_of(sums)});
  return {w, sums};
}
}  // namespace raccgan
