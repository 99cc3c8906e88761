// CBAM's forward op on a CPU: the order of its stages, and what couples the tiles that the kernels work on.
#include "stages.h"

namespace raccgan { namespace {
// saved.moments from the tiles of the samples first <= n < last, which share them.
void join_moments(const CbamForwardArgs& args, int64_t first, int64_t last, float* to) {
  const CbamShape& s = args.shape;
  const auto pixels = [&](int64_t tile) {
    const int64_t row = tile % tiles(s) * rows_per_tile(s);
    return static_cast<double>(std::min(rows_per_tile(s), s.h - row) * s.w);
  };
  double sum = 0, squares = 0;
  for (int64_t i = first * tiles(s); i < last * tiles(s); ++i) sum += pixels(i) * args.moments[i].mean;
  const double count = static_cast<double>((last - first) * s.h * s.w), mean = sum / count;
  for (int64_t i = first * tiles(s); i < last * tiles(s); ++i) {
    const double away = args.moments[i].mean - mean;
    squares += args.moments[i].squares + pixels(i) * away * away;
  }
  to[0] = static_cast<float>(mean);
  to[1] = static_cast<float>(squares / count);
}

void run_forward(const CbamCall& call, const Tensor& x_in, const CbamForwardArgs& args) {
  // do_group(arguments, first, last) with the group's samples in the arguments.
  const auto groups = [&](const auto& do_group) {
    for_groups(call.shape, 1, [&](int64_t begin, int64_t end, int64_t group) {
      const ChannelsLast x(call.shape, x_in, group);
      CbamForwardArgs of = args;
      each_group(begin, end, group, [&](int64_t first, int64_t last) {
        of.x = x.samples(first, last);
        do_group(of, first, last);
      });
    });
  };
  const auto apply = [](const CbamForwardArgs& of, int64_t first, int64_t last) {
    by_chunks(RACCGAN_SELECT(cbam_apply), of, first, last);
  };
  groups([&](const CbamForwardArgs& of, int64_t first, int64_t last) {
    by_chunks(RACCGAN_SELECT(cbam_pool), of, first, last);
    by_samples(RACCGAN_SELECT(cbam_gate), of, first, last);
    by_chunks(RACCGAN_SELECT(cbam_gather), of, first, last);
    by_tiles_with_scratch(RACCGAN_SELECT(cbam_convolve), of, first, last);
    if (call.coupled()) return;
    for (int64_t n = first; n < last && !call.fixed(); ++n) join_moments(of, n, n + 1, of.saved.moments + 2 * n);
    apply(of, first, last);
  });
  if (!call.coupled()) return;
  join_moments(args, 0, call.shape.n, args.saved.moments);
  groups(apply);
}

struct Cpu {
  explicit Cpu(const Tensor& x) { float32_or_bfloat16(x); }

  static void forward(const CbamCall& call, const Tensor& x, const CbamForwardOutputs& to) {
    const CbamShape& s = call.shape;
    const auto pooled = aligned_floats(s.n * chunks(s) * 2 * s.c);
    std::vector<CbamMoments> moments(s.n * tiles(s));
    const CbamForwardArgs args{call.args(to.saved), {}, to.y.mutable_data_ptr(), pooled.get(), moments.data()};
    float* const found = args.saved.moments;
    if (call.fixed()) found[0] = *data_of(call.mean), found[1] = *data_of(call.var);
    run_forward(call, x, args);
    for (int64_t i = 0; i < to.mean.numel(); ++i) {
      to.mean.mutable_data_ptr<float>()[i] = found[2 * i];
      to.var.mutable_data_ptr<float>()[i] = found[2 * i + 1];
    }
  }
};
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def(
      "cbam_native(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias,"
      " Tensor spatial_weight, Tensor norm_weight, Tensor norm_bias, Tensor? mean, Tensor? var, bool batch, float eps)"
      " -> (Tensor y, Tensor mean, Tensor var, Tensor saved)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) { m.impl("cbam_native", TORCH_BOX(&raccgan::cbam<raccgan::Cpu>)); }
