// CBAM's double backward op on a CPU, for norm "instance": the gradients of <grad_grad_x, gradient of x>.
#include "stages.h"

namespace raccgan { namespace {
int64_t memory_floats(const CbamShape& s) { return 6 * s.n * s.c + 5 * s.n * s.r + s.n * (2 * s.k * s.k + 2); }

// All but the images.
CbamDoubleBackwardArgs double_backward_args(const CbamArgs& given, const CbamGradientTensors& found,
                                            ScratchMemory& memory) {
  const CbamShape& s = given.shape;
  CbamDoubleBackwardArgs args{given};
  args.gradients = found.pointers();
  args.v_average = memory.next(s.n * s.c);
  args.v_maximum = memory.next(s.n * s.c);
  args.grad_average = memory.next(s.n * s.c);
  args.grad_maximum = memory.next(s.n * s.c);
  args.hidden = memory.next(s.n * s.r);
  args.grad_logits = memory.next(2 * s.n * s.c);
  args.grad_hidden = memory.next(4 * s.n * s.r);
  args.grad_spatial = memory.next(s.n * 2 * s.k * s.k);
  args.grad_norm = memory.next(2 * s.n);
  return args;
}

void run_double_backward(const CbamDoubleBackwardArgs& args) {
  const CbamShape& s = args.shape;
  share_out(s.n, s.c * pixels(s), [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_floats(double_backward_floats(s));
    RACCGAN_SELECT(cbam_double_backward)(args, scratch.get(), begin, end);
  });
  share_out(s.r + s.c, s.n * std::min(s.r, s.c),
            [&](int64_t begin, int64_t end) { RACCGAN_SELECT(cbam_weights_double_back)(args, begin, end); });
  add_up(args.grad_spatial, s.n, 2 * s.k * s.k, args.gradients.spatial_weight);
  float of_norm[2];
  add_up(args.grad_norm, s.n, 2, of_norm);
  *args.gradients.norm_weight = of_norm[0];
  *args.gradients.norm_bias = of_norm[1];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_double_backward_cpu(
    const Tensor& grad_grad_x_in, const Tensor& grad_y_in, const Tensor& x_in, const Tensor& reduce_weight,
    const Tensor& reduce_bias, const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight,
    const Tensor& norm_weight, const Tensor& norm_bias, double eps, const Tensor& saved) {
  const Optional none;
  const CbamInputs in({float32_or_bfloat16(x_in), reduce_weight, reduce_bias, expand_weight, expand_bias,
                       spatial_weight, norm_weight, norm_bias, none, none, false, eps});
  const CbamCall call(in);
  call.check_backward(grad_y_in, x_in, saved);
  STD_TORCH_CHECK(same_sizes(grad_grad_x_in, x_in) && grad_grad_x_in.scalar_type() == x_in.scalar_type(),
                  "grad_grad_x must be as x is");
  const CbamShape& s = call.shape;
  const Tensor x = channels_last(x_in), grad_y = channels_last(grad_y_in), v = channels_last(grad_grad_x_in);
  const Tensor grad_grad_y = empty_channels_last(x, s.c, s.h, s.w);
  const CbamGradientTensors found(s, x, {true, true, true, true, false});
  ScratchMemory memory(memory_floats(s));
  CbamDoubleBackwardArgs args = double_backward_args(call.args(saved), found, memory);
  args.x = x.const_data_ptr();
  args.grad_y = grad_y.const_data_ptr();
  args.v = v.const_data_ptr();
  args.grad_grad_y = grad_grad_y.mutable_data_ptr();
  run_double_backward(args);
  return std::tuple_cat(std::make_tuple(grad_grad_y), found.x_and_weights(in));
}
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def(
      "cbam_native_double_backward(Tensor grad_grad_x, Tensor grad_y, Tensor x, Tensor reduce_weight,"
      " Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight,"
      " Tensor norm_bias, float eps, Tensor saved) -> (Tensor grad_y, Tensor x, Tensor reduce_weight,"
      " Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight,"
      " Tensor norm_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("cbam_native_double_backward", TORCH_BOX(&raccgan::cbam_double_backward_cpu));
}
