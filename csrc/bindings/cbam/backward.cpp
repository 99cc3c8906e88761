// CBAM's backward op on a CPU: the order of its stages, and what couples the tiles that the kernels work on.
#include <cmath>
#include "stages.h"

namespace raccgan { namespace {
// The gradients of norm_weight, norm_bias, mean and var, summed over the groups of samples that share moments.
struct NormGradients {
  double weight = 0, bias = 0, mean = 0, var = 0;
};

// What the way back through the norm needs beside the kernels' arguments.
struct ThroughNorm {
  const CbamCall& call;
  const float *grad_mean, *grad_var;   // what comes back to the moments, or null
  CbamNormGradient* gradients;         // [N], out: CbamBackwardArgs::norm_gradient
};

// The way back through the norm of the samples first <= n < last, which share moments. With r = 1 / deviation and
// means over all their pixels: d s = norm_weight r (flow - mean flow - s' mean (flow s')), s' = r (s - mean), and from
// the moments themselves grad_mean / M + 2 grad_var (s - mean) / M. Moments that were given leave the first term alone.
NormGradients join_norm(const ThroughNorm& norm, const CbamBackwardArgs& args, int64_t first, int64_t last) {
  const CbamShape& s = args.shape;
  double flow = 0, product = 0;
  for (int64_t i = first * tiles(s); i < last * tiles(s); ++i) {
    flow += args.norm_sums[i].flow;
    product += args.norm_sums[i].product;
  }
  const float* const moments = moments_of(args, first);
  const double over = 1 / std::sqrt(static_cast<double>(moments[1]) + args.weights.eps);
  const double alpha = *args.weights.norm_weight * over;
  double beta = 0, gamma = 0;
  if (!norm.call.fixed()) {
    const double count = static_cast<double>((last - first) * pixels(s));
    beta = (norm.grad_mean == nullptr ? 0 : norm.grad_mean[first] / count) - alpha * flow / count;
    gamma = (norm.grad_var == nullptr ? 0 : 2 * norm.grad_var[first] / count) - alpha * over * product / count;
  }
  std::fill(norm.gradients + first, norm.gradients + last,
            CbamNormGradient{static_cast<float>(alpha), static_cast<float>(beta), static_cast<float>(gamma),
                             moments[0]});
  return {product, flow, -alpha * flow, -(alpha * over * product / 2)};
}

// From what flows to the scores to what flows to x.
void back_from_scores(const CbamBackwardArgs& args, int64_t first, int64_t last) {
  const bool channels = needs_channel_gate(args.gradients);
  if (channels || args.grad_spatial != nullptr) {
    by_tiles_with_scratch(RACCGAN_SELECT(cbam_convolve_back), args, first, last);
  }
  if (!channels) return;
  by_chunks(RACCGAN_SELECT(cbam_gather_back), args, first, last);
  by_samples(RACCGAN_SELECT(cbam_gate_back), args, first, last);
  if (args.gradients.x != nullptr) by_chunks(RACCGAN_SELECT(cbam_apply_back), args, first, last);
}

NormGradients run_backward(const ThroughNorm& norm, const Tensor& x_in, const Tensor& grad_y_in,
                           const CbamBackwardArgs& args) {
  const CbamShape& s = args.shape;
  const bool coupled = norm.call.coupled();
  std::vector<NormGradients> by_sample(coupled ? 1 : s.n);
  // do_group(arguments, first, last) with the group's samples in the arguments.
  const auto groups = [&](const auto& do_group) {
    for_groups(s, 2, [&](int64_t begin, int64_t end, int64_t group) {
      const ChannelsLast x(s, x_in, group), grad_y(s, grad_y_in, group);
      CbamBackwardArgs of = args;
      each_group(begin, end, group, [&](int64_t first, int64_t last) {
        of.x = x.samples(first, last);
        of.grad_y = grad_y.samples(first, last);
        do_group(of, first, last);
      });
    });
  };
  groups([&](const CbamBackwardArgs& of, int64_t first, int64_t last) {
    by_chunks(RACCGAN_SELECT(cbam_flow), of, first, last);
    const auto norm_sums = RACCGAN_SELECT(cbam_norm_sums);
    by_tiles(s, first, last, [&](int64_t begin, int64_t end) { norm_sums(of, begin, end); });
    if (coupled) return;
    for (int64_t n = first; n < last; ++n) by_sample[n] = join_norm(norm, of, n, n + 1);
    back_from_scores(of, first, last);
  });
  if (coupled) {
    by_sample[0] = join_norm(norm, args, 0, s.n);
    groups(back_from_scores);
  }
  NormGradients sum;
  for (const NormGradients& one : by_sample) {
    sum.weight += one.weight, sum.bias += one.bias;
    sum.mean += one.mean, sum.var += one.var;
  }
  return sum;
}

int64_t memory_floats(const CbamShape& s, const CbamNeeds& needs) {
  const int64_t nc = s.n * s.c, np = s.n * pixels(s);
  return 4 * np + 3 * nc * chunks(s) + 4 * nc + 2 * s.n * s.r +
         (needs.spatial_weight ? s.n * tiles(s) * 2 * s.k * s.k : 0);
}

// All but the way through the norm, which its caller adds.
CbamBackwardArgs backward_args(const CbamArgs& given, const CbamGradientTensors& found, ScratchMemory& memory) {
  const CbamShape& s = given.shape;
  const int64_t nc = s.n * s.c, np = s.n * pixels(s);
  CbamBackwardArgs args{given};
  args.gradients = found.pointers();
  args.flow = memory.next(np);
  args.ties = memory.next(np);
  args.grad_planes = memory.next(2 * np);
  args.sums = memory.next(3 * nc * chunks(s));
  args.grad_logits = memory.next(nc);
  args.grad_hidden = memory.next(2 * s.n * s.r);
  args.grad_average = memory.next(nc);
  args.grad_maximum = memory.next(nc);
  args.tied = memory.next(nc);
  args.grad_spatial = found.needs.spatial_weight ? memory.next(s.n * tiles(s) * 2 * s.k * s.k) : nullptr;
  return args;
}

// The gradients that are sums over what the stages leave.
void finish(const CbamBackwardArgs& args, const NormGradients& norm) {
  const CbamShape& s = args.shape;
  const CbamGradients& to = args.gradients;
  if (needs_mlp(to)) {
    const auto weights_back = RACCGAN_SELECT(cbam_weights_back);
    share_out(s.r + s.c, s.n * std::min(s.r, s.c), [&](int64_t begin, int64_t end) { weights_back(args, begin, end); });
  }
  if (args.grad_spatial != nullptr) add_up(args.grad_spatial, s.n * tiles(s), 2 * s.k * s.k, to.spatial_weight);
  const std::pair<float*, double> numbers[] = {
      {to.norm_weight, norm.weight}, {to.norm_bias, norm.bias}, {to.mean, norm.mean}, {to.var, norm.var}};
  for (const auto& [number, value] : numbers) {
    if (number != nullptr) *number = static_cast<float>(value);
  }
}

struct Cpu {
  explicit Cpu(const Tensor& x) { float32_or_bfloat16(x); }

  static void backward(const CbamCall& call, const CbamBackwardInputs& of, const CbamGradientTensors& found) {
    const CbamShape& s = call.shape;
    ScratchMemory memory(memory_floats(s, found.needs));
    std::vector<CbamNormSums> norm_sums(s.n * tiles(s));
    std::vector<CbamNormGradient> norm_gradient(s.n);
    CbamBackwardArgs args = backward_args(call.args(of.saved), found, memory);
    args.norm_sums = norm_sums.data();
    args.norm_gradient = norm_gradient.data();
    finish(args, run_backward({call, of.grad_mean, of.grad_var, norm_gradient.data()}, of.x, of.grad_y, args));
  }
};
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def(
      "cbam_native_backward(Tensor grad_y, Tensor? grad_mean, Tensor? grad_var, Tensor x, Tensor reduce_weight,"
      " Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight,"
      " Tensor norm_bias, Tensor? mean, Tensor? var, bool batch, float eps, Tensor saved, bool needs_x, bool needs_mlp,"
      " bool needs_spatial_weight, bool needs_norm, bool needs_moments) -> (Tensor x, Tensor reduce_weight,"
      " Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight,"
      " Tensor norm_bias, Tensor mean, Tensor var)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("cbam_native_backward", TORCH_BOX(&raccgan::cbam_backward<raccgan::Cpu>));
}
