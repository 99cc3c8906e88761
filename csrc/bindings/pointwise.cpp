// The bindings of a pointwise convolution and of its two gradients.
#include "pointwise.h"

namespace raccgan {
namespace {
// Multiply-adds that take as long as an element of share_out.
constexpr int64_t kMultiplyAddsAnElement = 32;

// w [D, C, 1, 1]
Tensor matrix(const Tensor& w) {
  STD_TORCH_CHECK(w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1, "w must be [D, C, 1, 1]");
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float, "w must be float32");
  return dense(w);
}

// Header of packed weights: their shape, target and dtype. As long as a cache line, to which the weights are aligned.
struct Header {
  int64_t rows, columns;
  Target target;
  Dtype dtype;

  bool operator==(const Header&) const = default;
};
constexpr int64_t kHeaderFloats = 16;
static_assert(sizeof(Header) <= kHeaderFloats * sizeof(float));

// y = x w^T, for images x of the dtype.
ProductArgs product_with(const Tensor& w, int64_t m, Dtype dtype) {
  return {m, w.size(1), w.size(0), dtype, nullptr, w.const_data_ptr<float>(), true};
}

Header header_of(const ProductArgs& args) { return {args.n, args.k, chosen_target(), args.dtype}; }

// The panels in a tensor that pointwise_packed_cpu made, for the same product; null where they were made for another
// dtype or processor, as in a model that was moved.
const float* panels_in(const Tensor& packed, const ProductArgs& args) {
  const int64_t floats = RACCGAN_SELECT(packed_factor)(args);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 1 && packed.is_contiguous() &&
                      packed.numel() >= kHeaderFloats,
                  "packed must be what pointwise_native_packed returned");
  Header found;
  memcpy(&found, packed.const_data_ptr(), sizeof found);
  if (!(found == header_of(args))) return nullptr;
  STD_TORCH_CHECK(packed.numel() == kHeaderFloats + floats, "packed is not as its header says");
  return floats == 0 ? nullptr : packed.const_data_ptr<float>() + kHeaderFloats;
}

Tensor pointwise_packed_cpu(const Tensor& w_in, bool halves) {
  const Tensor w = matrix(w_in);
  const ProductArgs args = product_with(w, 0, halves ? Dtype::kBFloat16 : Dtype::kFloat32);
  const Header header = header_of(args);
  Tensor packed = new_floats(w, {kHeaderFloats + RACCGAN_SELECT(packed_factor)(args)});
  float* const to = packed.mutable_data_ptr<float>();
  std::fill_n(to, kHeaderFloats, 0.0f);
  memcpy(to, &header, sizeof header);
  if (packed.numel() > kHeaderFloats) RACCGAN_SELECT(pack_factor)(args, to + kHeaderFloats);
  return packed;
}

Tensor like(const Tensor& t, int64_t channels) { return empty_channels_last(t, channels, t.size(2), t.size(3)); }

void multiply(const ProductArgs& args) {
  const auto product = RACCGAN_SELECT(product);
  const int64_t scratch = RACCGAN_SELECT(product_scratch)(args);
  const int64_t count = RACCGAN_SELECT(product_tasks)(args);
  if (count == 0) return;
  share_out(count, args.m * args.k * args.n / count / kMultiplyAddsAnElement, [&](int64_t begin, int64_t end) {
    const auto memory = aligned_floats(scratch);
    product(args, memory.get(), begin, end);
  });
}

Tensor pointwise_transposed_cpu(const Tensor& g_in, const Tensor& w_in) {
  const Tensor g = image(g_in, "g"), w = matrix(w_in), x = like(g, w.size(1));
  STD_TORCH_CHECK(g.size(1) == w.size(0), "g must have as many channels as w has rows, ", w.size(0));
  multiply({pixels(g), w.size(0), w.size(1), dtype_of(g, "g"), g.const_data_ptr(), w.const_data_ptr<float>(), false,
            nullptr, nullptr, nullptr, x.mutable_data_ptr()});
  return x;
}

std::tuple<Tensor, Tensor> pointwise_product_cpu(const Tensor& x_in, const Tensor& g_in, bool needs_sums) {
  const Tensor x = image(x_in, "x"), g = image(g_in, "g");
  STD_TORCH_CHECK(x.size(0) == g.size(0) && x.size(2) == g.size(2) && x.size(3) == g.size(3),
                  "x and g must be of as many images, and of one size");
  STD_TORCH_CHECK(x.scalar_type() == g.scalar_type(), "x and g must be of one dtype");
  const int64_t c = x.size(1), d = g.size(1);
  const Tensor w = new_floats(x, {d, c, 1, 1}), sums = new_floats(x, {needs_sums ? d : 0});
  const int64_t chunks = correlation_chunks(pixels(x));
  AlignedFloats partial, partial_sums;
  const auto by_chunks = [&](const Tensor& t, AlignedFloats& memory) {  // or in place, where there is one chunk
    if (chunks == 1) return t.mutable_data_ptr<float>();
    memory = aligned_floats(chunks * t.numel());
    return memory.get();
  };
  const CorrelationArgs args({pixels(x), d, c, dtype_of(x, "x"), g.const_data_ptr(), x.const_data_ptr(),
                              by_chunks(w, partial), needs_sums ? by_chunks(sums, partial_sums) : nullptr});
  const int64_t tasks = RACCGAN_SELECT(correlation_tasks)(args);
  const auto correlation = RACCGAN_SELECT(correlation);
  if (tasks > 0) {
    share_out(tasks, args.m * c * d / tasks / kMultiplyAddsAnElement, [&](int64_t begin, int64_t end) {
      const auto memory = aligned_floats(RACCGAN_SELECT(correlation_scratch)(args));
      correlation(args, memory.get(), begin, end);
    });
  }
  if (chunks != 1) {
    add_up(args.partial, chunks, w.numel(), w.mutable_data_ptr<float>());
    if (needs_sums) add_up(args.sums, chunks, d, sums.mutable_data_ptr<float>());
  }
  return {w, sums};
}

Tensor pointwise_cpu(const Tensor& x_in, const Tensor& w, const Optional& bias, const Optional& residual,
                     const Optional& packed) {
  const Tensor x = image(x_in, "x");
  PointwiseCall call(x, x.size(1), x.size(2), x.size(3), w, bias, residual, packed);
  call.all(x);
  return call.y;
}
}  // namespace

PointwiseCall::PointwiseCall(const Tensor& like, int64_t c, int64_t h, int64_t v, const Tensor& w_in,
                             const Optional& bias_in, const Optional& residual_in, const Optional& packed)
    : w(matrix(w_in)), y(empty_channels_last(like, w.size(0), h, v)) {
  STD_TORCH_CHECK(c == w.size(1), "x must have as many channels as w has columns, ", w.size(1));
  if (bias_in) bias = floats(*bias_in, w.size(0), "the bias must be float32 [D]");
  if (residual_in) {
    STD_TORCH_CHECK(residual_in->dim() == 4 && same_sizes(*residual_in, y), "the residual must be [N, D, H, W]");
    STD_TORCH_CHECK(residual_in->scalar_type() == y.scalar_type(), "x and the residual must be of one dtype");
    residual = channels_last(*residual_in);
  }
  args = product_with(w, pixels(y), dtype_of(y, "x"));
  args.out = y.mutable_data_ptr();
  args.packed = packed ? panels_in(*packed, args) : nullptr;
  args.bias = data_of(bias);
  args.residual = residual ? residual->const_data_ptr() : nullptr;
}

void PointwiseCall::pack() {
  const int64_t floats = RACCGAN_SELECT(packed_factor)(args);
  if (args.packed != nullptr || floats == 0) return;
  panels_ = aligned_floats(floats);
  RACCGAN_SELECT(pack_factor)(args, panels_.get());
  args.packed = panels_.get();
}

void PointwiseCall::all(const Tensor& x) {
  args.a = x.const_data_ptr();
  multiply(args);
}

void PointwiseCall::rows(int64_t first, int64_t count, const void* a, float* scratch) const {
  const int64_t offset = first * args.n * size_of(args.dtype);
  ProductArgs some = args;
  some.m = count, some.a = a;
  some.out = static_cast<char*>(args.out) + offset;
  if (args.residual != nullptr) some.residual = static_cast<const char*>(args.residual) + offset;
  RACCGAN_SELECT(product)(some, scratch, 0, RACCGAN_SELECT(product_tasks)(some));
}
}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def("pointwise_native(Tensor x, Tensor w, Tensor? bias, Tensor? residual, Tensor? packed=None) -> Tensor");
  m.def("pointwise_native_packed(Tensor w, bool halves) -> Tensor");  // for one of many calls with these weights
  m.def("pointwise_native_transposed(Tensor g, Tensor w) -> Tensor");
  m.def("pointwise_native_product(Tensor x, Tensor g, bool needs_sums) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("pointwise_native", TORCH_BOX(&raccgan::pointwise_cpu));
  m.impl("pointwise_native_packed", TORCH_BOX(&raccgan::pointwise_packed_cpu));
  m.impl("pointwise_native_transposed", TORCH_BOX(&raccgan::pointwise_transposed_cpu));
  m.impl("pointwise_native_product", TORCH_BOX(&raccgan::pointwise_product_cpu));
}
