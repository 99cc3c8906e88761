// The bindings of the depthwise half of a depthwise-separable convolution, and of its two derivatives.
#include <memory>
#include <new>
#include <tuple>

#include "../cpu/depthwise_separable.h"
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

Tensor as_float(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float)); }

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// The checked operands of a call, in the layout that the kernels read.
struct Call {
  Tensor x, w;
  std::optional<Tensor> scale, shift;
  DepthwiseLayer layer;
  std::unique_ptr<float[], Free> packed;

  Call(const Tensor& x_in, const Tensor& w_in, const std::optional<Tensor>& scale_in,
       const std::optional<Tensor>& shift_in, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
       bool rectify, double eps)
      : x(x_in), w(w_in) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W]");
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                    "x must be float32 or bfloat16");
    const int64_t n = x.size(0), c = x.size(1), k = w.dim() == 4 ? w.size(3) : 0;
    STD_TORCH_CHECK(k > 0 && w.size(0) == c && w.size(1) == 1 && w.size(2) == k, "w must be [C, 1, k, k]");
    STD_TORCH_CHECK(k == 3 || k == 5 || k == 7, "the kernel size must be 3, 5 or 7, got ", k);
    STD_TORCH_CHECK(w.device() == x.device(), "x and w must be on one device");
    STD_TORCH_CHECK((upsample == 1 || upsample == 2) && (pool == 1 || pool == 2) && upsample * pool <= 2,
                    "upsample and pool must be 1 or 2, and not both 2");
    STD_TORCH_CHECK(scale_in.has_value() == shift_in.has_value(), "give both scale and shift, or neither");
    for (const auto& t : {scale_in, shift_in}) {
      STD_TORCH_CHECK(!t || (t->dim() == 2 && t->size(0) == n && t->size(1) == c), "scale and shift must be [N, C]");
      STD_TORCH_CHECK(!t || t->device() == x.device(), "x, scale and shift must be on one device");
    }
    if (scale_in) scale = as_float(*scale_in), shift = as_float(*shift_in);
    x = channels_last(x);
    w = as_float(w);
    layer = {n, c, x.size(2), x.size(3), k,
             upsample == 2 ? Resize::kUp : pool == 2 ? Resize::kDown : Resize::kPlain,
             rectify_first, normalise, rectify, static_cast<float>(eps), dtype_of(x, "x"),
             scale ? scale->const_data_ptr<float>() : nullptr, shift ? shift->const_data_ptr<float>() : nullptr};
    if (x.numel() == 0) return;
    packed = floats(RACCGAN_SELECT(packed_floats)(layer));
    RACCGAN_SELECT(pack_weights)(layer, w.const_data_ptr<float>(), packed.get());
  }

  Tensor like_x(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.dim() == 4 && same_sizes(t, x), what, " must be [N, C, H, W] as x is");
    return same_kind(t, what);
  }

  Tensor like_y(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == layer.n && t.size(1) == layer.c && t.size(2) == layer.out(layer.h) &&
                        t.size(3) == layer.out(layer.w),
                    what, " must be [N, C, H, W] of the output");
    return same_kind(t, what);
  }

  Tensor same_kind(const Tensor& t, const char* what) const {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), what, " and x must be of one dtype");
    STD_TORCH_CHECK(t.device() == x.device(), what, " and x must be on one device");
    return channels_last(t);
  }

  Tensor empty_x() const { return empty_channels_last(x, layer.c, layer.h, layer.w); }
  Tensor empty_y() const { return empty_channels_last(x, layer.c, layer.out(layer.h), layer.out(layer.w)); }
  Tensor empty_parameter() const { return torch::stable::new_empty(x, {layer.n, layer.c}, ScalarType::Float); }

  // Runs pass(scratch, begin, end) over the tasks.
  template <class Pass>
  void run(const Pass& pass) const {
    const int64_t tasks = RACCGAN_SELECT(tasks)(layer), scratch = RACCGAN_SELECT(scratch_floats)(layer);
    share_out(tasks, x.numel() / tasks * layer.k, [&](int64_t begin, int64_t end) {
      const auto memory = floats(scratch);
      std::fill_n(memory.get(), scratch, 0.0f);
      pass(memory.get(), begin, end);
    });
  }

  // run, with what the pieces add to the gradient of w, where that is wanted; returns that gradient.
  template <class Pass>
  Tensor run_with_weights(bool want_w, const Pass& pass) const {
    if (!want_w) {
      run([&](float* scratch, int64_t begin, int64_t end) { pass(nullptr, scratch, begin, end); });
      return nothing(x);
    }
    const int64_t size = layer.k * layer.k, c = layer.c;
    const auto partial = floats(pieces(layer) * size * c);
    run([&](float* scratch, int64_t begin, int64_t end) { pass(partial.get(), scratch, begin, end); });
    const Tensor sum = torch::stable::new_empty(x, {c, 1, layer.k, layer.k}, ScalarType::Float);
    float* const to = sum.mutable_data_ptr<float>();
    std::vector<float> by_tap(size * c);
    add_up(partial.get(), pieces(layer), size * c, by_tap.data());
    for (int64_t i = 0; i < size * c; ++i) to[i % c * size + i / c] = by_tap[i];
    return sum;
  }
};

void* data_of(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr() : nullptr; }
float* floats_of(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr<float>() : nullptr; }

// What a call on nothing returns.
Tensor zeros_for_weights(const Call& call) {
  const Tensor zeros = torch::stable::new_empty(call.x, {call.layer.c, 1, call.layer.k, call.layer.k}, ScalarType::Float);
  std::fill_n(zeros.mutable_data_ptr<float>(), zeros.numel(), 0.0f);
  return zeros;
}

Tensor depthwise_cpu(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first,
                     bool normalise, bool rectify, double eps) {
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor y = call.empty_y();
  if (y.numel() == 0) return y;
  const ForwardArgs args{call.layer, call.x.const_data_ptr(), call.packed.get(), y.mutable_data_ptr()};
  const auto forward = RACCGAN_SELECT(forward);
  call.run([&](float* scratch, int64_t begin, int64_t end) { forward(args, scratch, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_backward_cpu(
    const Tensor& g_in, const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
    bool rectify, double eps, bool want_x, bool want_w, bool want_affine) {
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor g = call.like_y(g_in, "g");
  const Tensor grad_x = want_x ? call.empty_x() : nothing(x);
  const Tensor grad_scale = want_affine ? call.empty_parameter() : nothing(x);
  const Tensor grad_shift = want_affine ? call.empty_parameter() : nothing(x);
  if (call.x.numel() == 0) return {grad_x, want_w ? zeros_for_weights(call) : nothing(x), grad_scale, grad_shift};
  const BackwardArgs args{call.layer, g.const_data_ptr(), call.x.const_data_ptr(), call.packed.get(),
                          data_of(grad_x, want_x), nullptr, floats_of(grad_scale, want_affine),
                          floats_of(grad_shift, want_affine)};
  const auto backward = RACCGAN_SELECT(backward);
  const Tensor grad_w = call.run_with_weights(want_w, [&](float* partial, float* scratch, int64_t begin, int64_t end) {
    BackwardArgs with = args;
    with.partial_w = partial;
    backward(with, scratch, begin, end);
  });
  return {grad_x, grad_w, grad_scale, grad_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_double_backward_cpu(
    const Tensor& t_in, const Tensor& g_in, const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t upsample, int64_t pool, bool rectify_first, bool normalise,
    bool rectify, double eps, bool want_g, bool want_x, bool want_w, bool want_scale) {
  const Call call(x, w, scale, shift, upsample, pool, rectify_first, normalise, rectify, eps);
  const Tensor t = call.like_x(t_in, "t"), g = call.like_y(g_in, "g");
  const Tensor grad_g = want_g ? call.empty_y() : nothing(x), grad_x = want_x ? call.empty_x() : nothing(x);
  const Tensor grad_scale = want_scale ? call.empty_parameter() : nothing(x);
  if (call.x.numel() == 0) return {grad_g, grad_x, want_w ? zeros_for_weights(call) : nothing(x), grad_scale};
  const DoubleBackwardArgs args{call.layer, t.const_data_ptr(), g.const_data_ptr(), call.x.const_data_ptr(),
                                call.packed.get(), data_of(grad_g, want_g), data_of(grad_x, want_x), nullptr,
                                floats_of(grad_scale, want_scale)};
  const auto double_backward = RACCGAN_SELECT(double_backward);
  const Tensor grad_w = call.run_with_weights(want_w, [&](float* partial, float* scratch, int64_t begin, int64_t end) {
    DoubleBackwardArgs with = args;
    with.partial_w = partial;
    double_backward(with, scratch, begin, end);
  });
  return {grad_g, grad_x, grad_w, grad_scale};
}

}  // namespace
}  // namespace raccgan

#define RACCGAN_LAYER                                                                                    \
  "Tensor x, Tensor w, Tensor? scale, Tensor? shift, int upsample, int pool, bool rectify_first, "      \
  "bool normalise, bool rectify, float eps"

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def("depthwise_native(" RACCGAN_LAYER ") -> Tensor");
  m.def("depthwise_native_backward(Tensor g, " RACCGAN_LAYER
        ", bool want_x, bool want_w, bool want_affine) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise_native_double_backward(Tensor t, Tensor g, " RACCGAN_LAYER
        ", bool want_g, bool want_x, bool want_w, bool want_scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise_cpu));
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward_cpu));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward_cpu));
}
