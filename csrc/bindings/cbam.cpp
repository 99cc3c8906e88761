// The bindings of CBAM: the order of its stages, and what couples the pieces that the kernels work on.
#include <cmath>
#include <string>
#include <utility>

#include "../cpu/cbam.h"
#include "cbam.h"

namespace raccgan {
namespace {

// ---- arguments ----------------------------------------------------------------------------------------------------

struct Given : CbamGiven<CbamShape> {
  template <class... Others>
  explicit Given(const Tensor& x, const Others&... others) : CbamGiven(float32_or_bfloat16(x), others...) {}

  CbamWeights weights() const {
    const auto of = [](const Tensor& t) { return t.const_data_ptr<float>(); };
    return {of(reduce_weight),  of(reduce_bias),  of(expand_weight), of(expand_bias),
            of(spatial_weight), *of(norm_weight), *of(norm_bias),    eps};
  }

  bool coupled() const { return batch && !fixed(); }  // whether the moments depend on all samples
  int64_t moments_stride() const { return shared() ? 0 : 2; }
  int64_t scores_a_moment() const { return pixels() * (batch ? shape.n : 1); }
};

// All of CbamSaved, one after the other in one tensor.
CbamSaved saved_in(const Given& given, float* at) {
  const CbamShape& s = given.shape;
  const auto next = [&](int64_t count) { return std::exchange(at, at + count); };
  CbamSaved saved;
  saved.average = next(s.n * s.c);
  saved.maximum = next(s.n * s.c);
  saved.hidden = next(s.n * 3 * s.r);
  saved.gate = next(s.n * s.c);
  saved.planes = next(s.n * 2 * given.pixels());
  saved.scores = next(s.n * given.pixels());
  saved.moments = next(2 * given.moments());
  return saved;
}

// ---- work ---------------------------------------------------------------------------------------------------------

// do_samples(first, last, group) for all samples, `group` of them at a time so that they stay in a cache from one stage
// to the next. Where one fits a core's own, each thread takes samples through all stages by itself, and none waits for
// another between two stages; else all threads share out each stage of a group.
template <class Samples>
void for_groups(const Given& given, int64_t tensors, const Samples& do_samples) {
  constexpr int64_t kBytes = 1 << 19;  // of a second-level cache
  const CbamShape& s = given.shape;
  const int64_t elements = s.c * given.pixels(), bytes = elements * size_of(s.dtype) * tensors;
  const int64_t threads = torch::stable::get_num_threads();
  if (bytes <= kBytes && s.n >= threads) {
    share_out(s.n, elements, [&](int64_t begin, int64_t end) { do_samples(begin, end, 1); });
  } else {
    do_samples(0, s.n, std::max<int64_t>(1, kBytes * threads / std::max<int64_t>(1, bytes)));
  }
}

// do_group(first, last) for the groups of the samples first <= n < last.
template <class Group>
void each_group(int64_t first, int64_t last, int64_t group, const Group& do_group) {
  for (int64_t n = first; n < last; n += group) do_group(n, std::min(last, n + group));
}

// Shares out the tasks, `a_sample` of them each of about `elements`, of the samples first <= n < last.
template <class Work>
void share_out_samples(int64_t first, int64_t last, int64_t a_sample, int64_t elements, const Work& work) {
  share_out((last - first) * a_sample, elements,
            [&](int64_t begin, int64_t end) { work(first * a_sample + begin, first * a_sample + end); });
}

int64_t elements_a_piece(const CbamShape& s) { return std::min(pixels_a_piece(s), s.h * s.w) * s.c; }

template <class Kernel, class Args>
void by_pieces(const Kernel& kernel, const Args& args, int64_t first, int64_t last) {
  share_out_samples(first, last, pieces(args.shape), elements_a_piece(args.shape),
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Kernel, class Args>
void by_samples(const Kernel& kernel, const Args& args, int64_t first, int64_t last) {
  share_out_samples(first, last, 1, args.shape.c * args.shape.r,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Work>
void by_bands(const CbamShape& s, int64_t first, int64_t last, const Work& work) {
  share_out_samples(first, last, bands(s), rows_a_band(s) * s.w * s.k, work);
}

template <class Kernel, class Args>
void by_bands_with_scratch(const Kernel& kernel, const Args& args, int64_t first, int64_t last) {
  by_bands(args.shape, first, last, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_floats(scratch_floats(args.shape));
    kernel(args, scratch.get(), begin, end);
  });
}

// A tensor as the kernels read it. From any other layout than channels_last it is copied group by group, each group to
// the same place: that stays in a cache, and costs no memory that the system has to hand out first.
class ChannelsLast {
 public:
  ChannelsLast(const CbamShape& shape, const Tensor& t, int64_t group) : shape_(shape), tensor_(t) {
    if (is_channels_last(t)) return;
    tensor_ = dense(t);
    copy_.emplace(empty_channels_last(t, std::min(group, shape.n), shape.c, shape.h, shape.w));
  }

  CbamSamples samples(int64_t first, int64_t last) const {
    if (!copy_) return {tensor_.const_data_ptr(), 0};
    const auto copy = RACCGAN_SELECT(cbam_to_channels_last);
    void* const to = copy_->mutable_data_ptr();
    share_out_samples(first, last, pieces(shape_), elements_a_piece(shape_), [&](int64_t begin, int64_t end) {
      copy(shape_, tensor_.const_data_ptr(), to, first, begin, end);
    });
    return {to, first};
  }

 private:
  CbamShape shape_;
  Tensor tensor_;
  Optional copy_;
};

// ---- forward ------------------------------------------------------------------------------------------------------

// saved.moments from the bands of the samples first <= n < last, which share them.
void join_moments(const CbamForwardArgs& args, int64_t first, int64_t last, float* to) {
  const CbamShape& s = args.shape;
  const auto pixels = [&](int64_t band) {
    const int64_t row = band % bands(s) * rows_a_band(s);
    return static_cast<double>(std::min(rows_a_band(s), s.h - row) * s.w);
  };
  double sum = 0, squares = 0;
  for (int64_t i = first * bands(s); i < last * bands(s); ++i) sum += pixels(i) * args.moments[i].mean;
  const double count = static_cast<double>((last - first) * s.h * s.w), mean = sum / count;
  for (int64_t i = first * bands(s); i < last * bands(s); ++i) {
    const double away = args.moments[i].mean - mean;
    squares += args.moments[i].squares + pixels(i) * away * away;
  }
  to[0] = static_cast<float>(mean);
  to[1] = static_cast<float>(squares / count);
}

void run_forward(const Given& given, const Tensor& x_in, const CbamForwardArgs& args) {
  // do_group(arguments, first, last) with the group's samples in the arguments.
  const auto groups = [&](const auto& do_group) {
    for_groups(given, 1, [&](int64_t begin, int64_t end, int64_t group) {
      const ChannelsLast x(given.shape, x_in, group);
      CbamForwardArgs of = args;
      each_group(begin, end, group, [&](int64_t first, int64_t last) {
        of.x = x.samples(first, last);
        do_group(of, first, last);
      });
    });
  };
  const auto apply = [](const CbamForwardArgs& of, int64_t first, int64_t last) {
    by_pieces(RACCGAN_SELECT(cbam_apply), of, first, last);
  };
  groups([&](const CbamForwardArgs& of, int64_t first, int64_t last) {
    if (of.average || of.maximum) by_pieces(RACCGAN_SELECT(cbam_pool), of, first, last);
    by_samples(RACCGAN_SELECT(cbam_gate), of, first, last);
    by_pieces(RACCGAN_SELECT(cbam_gather), of, first, last);
    by_bands_with_scratch(RACCGAN_SELECT(cbam_convolve), of, first, last);
    if (given.coupled()) return;
    for (int64_t n = first; n < last && !given.fixed(); ++n) join_moments(of, n, n + 1, of.saved.moments + 2 * n);
    apply(of, first, last);
  });
  if (!given.coupled()) return;
  join_moments(args, 0, given.shape.n, args.saved.moments);
  groups(apply);
}

// The moments as the op returns them: none where they were given.
std::tuple<Tensor, Tensor> moments_of(const Given& given, const Tensor& x, const float* moments) {
  const int64_t count = given.fixed() ? 0 : given.moments();
  const Tensor mean = new_floats(x, {count}), var = new_floats(x, {count});
  for (int64_t i = 0; i < count; ++i) {
    mean.mutable_data_ptr<float>()[i] = moments[2 * i];
    var.mutable_data_ptr<float>()[i] = moments[2 * i + 1];
  }
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cbam_cpu(
    const Tensor& x_in, const Optional& average, const Optional& maximum, const Tensor& reduce_weight,
    const Tensor& reduce_bias, const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight,
    const Tensor& norm_weight, const Tensor& norm_bias, const Optional& mean, const Optional& var, bool batch,
    double eps) {
  const Given given(x_in, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                    norm_weight, norm_bias, mean, var, batch, eps);
  const CbamShape& s = given.shape;
  const Tensor y = empty_channels_last(x_in, s.c, s.h, s.w), saved_tensor = new_floats(x_in, {given.saved_floats()});
  const CbamSaved saved = saved_in(given, saved_tensor.mutable_data_ptr<float>());
  if (given.average) std::copy_n(given.average->const_data_ptr<float>(), s.n * s.c, saved.average);
  if (given.maximum) std::copy_n(given.maximum->const_data_ptr<float>(), s.n * s.c, saved.maximum);
  if (given.fixed()) {
    saved.moments[0] = *given.mean->const_data_ptr<float>();
    saved.moments[1] = *given.var->const_data_ptr<float>();
  }
  const auto pooled = aligned_floats(s.n * pieces(s) * 2 * s.c);
  std::vector<CbamMoments> moments(s.n * bands(s));
  run_forward(given, x_in, {s, given.weights(), saved, {}, y.mutable_data_ptr(), pooled.get(), moments.data(),
                            !given.average, !given.maximum, given.moments_stride()});
  return std::tuple_cat(std::make_tuple(y), moments_of(given, x_in, saved.moments), std::make_tuple(saved_tensor));
}

// ---- backward -----------------------------------------------------------------------------------------------------

constexpr int64_t kMlp = bit(kReduceWeight) | bit(kReduceBias) | bit(kExpandWeight) | bit(kExpandBias);
constexpr int64_t kChannels = bit(kX) | bit(kAverage) | bit(kMaximum) | kMlp;

// The gradients of norm_weight, norm_bias, mean and var, summed over the groups of samples that share moments.
struct NormGradients {
  double weight = 0, bias = 0, mean = 0, var = 0;
};

// What flows through the norm of the samples first <= n < last, which share moments. With r = 1 / deviation and
// means over all their pixels: d s = norm_weight r (flow - mean flow - s' mean (flow s')), s' = r (s - mean), and from
// the moments themselves g_mean / M + 2 g_var (s - mean) / M. Moments that were given leave the first term alone.
void join_norm(const Given& given, const CbamBackwardArgs& args, const float* g_mean, const float* g_var,
               int64_t first, int64_t last, NormGradients& gradients, CbamNormGradient* to) {
  const CbamShape& s = args.shape;
  double flow = 0, product = 0;
  for (int64_t i = first * bands(s); i < last * bands(s); ++i) {
    flow += args.norm_sums[i].flow;
    product += args.norm_sums[i].product;
  }
  const float* const moments = args.saved.moments + first * args.moments_stride;
  const double over = 1 / std::sqrt(static_cast<double>(moments[1]) + given.eps);
  const double alpha = args.weights.norm_weight * over;
  double beta = 0, gamma = 0;
  if (!given.fixed()) {
    const double count = static_cast<double>(given.scores_a_moment());
    const int64_t at = given.batch ? 0 : first;
    beta = (g_mean == nullptr ? 0 : g_mean[at] / count) - alpha * flow / count;
    gamma = (g_var == nullptr ? 0 : 2 * g_var[at] / count) - alpha * over * product / count;
  }
  gradients.weight += product;
  gradients.bias += flow;
  gradients.mean -= alpha * flow;
  gradients.var -= alpha * over * product / 2;
  std::fill(to + first, to + last,
            CbamNormGradient{static_cast<float>(alpha), static_cast<float>(beta), static_cast<float>(gamma),
                             moments[0]});
}

NormGradients run_backward(const Given& given, const Tensor& x_in, const Tensor& g_y_in, const CbamBackwardArgs& args,
                           const float* g_mean, const float* g_var, CbamNormGradient* norm_gradient) {
  const int64_t samples = given.shape.n;
  std::vector<NormGradients> by_sample(given.coupled() ? 1 : samples);
  const auto through_the_norm = [](const CbamBackwardArgs& of, int64_t first, int64_t last) {
    if (of.channels || of.spatial != nullptr) {
      by_bands_with_scratch(RACCGAN_SELECT(cbam_convolve_back), of, first, last);
    }
    if (!of.channels) return;
    by_pieces(RACCGAN_SELECT(cbam_gather_back), of, first, last);
    by_samples(RACCGAN_SELECT(cbam_gate_back), of, first, last);
    if (of.g_x != nullptr) by_pieces(RACCGAN_SELECT(cbam_apply_back), of, first, last);
  };
  // do_group(arguments, first, last) with the group's samples in the arguments.
  const auto groups = [&](const auto& do_group) {
    for_groups(given, 2, [&](int64_t begin, int64_t end, int64_t group) {
      const ChannelsLast x(given.shape, x_in, group), g_y(given.shape, g_y_in, group);
      CbamBackwardArgs of = args;
      each_group(begin, end, group, [&](int64_t first, int64_t last) {
        of.x = x.samples(first, last);
        of.g_y = g_y.samples(first, last);
        do_group(of, first, last);
      });
    });
  };
  groups([&](const CbamBackwardArgs& of, int64_t first, int64_t last) {
    by_pieces(RACCGAN_SELECT(cbam_flow), of, first, last);
    const auto norm_sums = RACCGAN_SELECT(cbam_norm_sums);
    by_bands(of.shape, first, last, [&](int64_t begin, int64_t end) { norm_sums(of, begin, end); });
    if (given.coupled()) return;
    for (int64_t n = first; n < last; ++n) join_norm(given, of, g_mean, g_var, n, n + 1, by_sample[n], norm_gradient);
    through_the_norm(of, first, last);
  });
  if (given.coupled()) {
    join_norm(given, args, g_mean, g_var, 0, samples, by_sample[0], norm_gradient);
    groups(through_the_norm);
  }
  NormGradients sum;
  for (const NormGradients& one : by_sample) {
    sum.weight += one.weight;
    sum.bias += one.bias;
    sum.mean += one.mean;
    sum.var += one.var;
  }
  return sum;
}

// The backward pass's own memory, float32, one after the other.
struct Work {
  AlignedFloats all;
  float* at;

  explicit Work(int64_t count) : all(aligned_floats(count)), at(all.get()) {}
  float* next(int64_t count) { return std::exchange(at, at + count); }
};

Gradients backward(const Given& given, const Tensor& g_y_in, const Optional& g_mean, const Optional& g_var,
                   const Tensor& x_in, const Tensor& saved, int64_t wanted) {
  const CbamShape& s = given.shape;
  const Gradients gradients = new_gradients(s, x_in, wanted);
  const int64_t nc = s.n * s.c, nr = s.n * s.r, np = s.n * given.pixels(), taps = 2 * s.k * s.k;
  const bool channels = wanted & kChannels, spatial = wanted & bit(kSpatialWeight);
  std::vector<CbamNormSums> norm_sums(s.n * bands(s));
  std::vector<CbamNormGradient> norm_gradient(s.n);
  Work work(4 * np + 3 * nc * pieces(s) + 4 * nc + 2 * nr + s.n * bands(s) * taps + (wanted & kMlp ? 2 * s.c * s.r + s.c + s.r : 0));
  const auto own = [&](Input input) { return gradients[input].mutable_data_ptr<float>(); };
  const auto or_work = [&](Input input, int64_t count) { return wanted & bit(input) ? own(input) : work.next(count); };

  CbamBackwardArgs args{};
  args.shape = s;
  args.weights = given.weights();
  args.saved = saved_in(given, const_cast<float*>(saved.const_data_ptr<float>()));
  args.g_x = wanted & bit(kX) ? gradients[kX].mutable_data_ptr() : nullptr;
  args.flow = work.next(np);
  args.ties = work.next(np);
  args.g_planes = work.next(2 * np);
  args.sums = work.next(3 * nc * pieces(s));
  args.g_logits = work.next(nc);
  args.g_hidden = work.next(2 * nr);
  args.g_average = or_work(kAverage, nc);
  args.g_maximum = or_work(kMaximum, nc);
  args.tied = work.next(nc);
  args.spatial = spatial ? work.next(s.n * bands(s) * taps) : nullptr;
  args.norm_sums = norm_sums.data();
  args.norm_gradient = norm_gradient.data();
  args.channels = channels;
  args.average = !given.average;
  args.maximum = !given.maximum;
  args.moments_stride = given.moments_stride();
  const auto of = [](const Optional& t) { return t ? t->const_data_ptr<float>() : nullptr; };
  const NormGradients norm = run_backward(given, x_in, g_y_in, args, of(g_mean), of(g_var), norm_gradient.data());

  if (wanted & kMlp) {
    args.g_reduce_weight = or_work(kReduceWeight, s.r * s.c);
    args.g_reduce_bias = or_work(kReduceBias, s.r);
    args.g_expand_weight = or_work(kExpandWeight, s.c * s.r);
    args.g_expand_bias = or_work(kExpandBias, s.c);
    const auto weights_back = RACCGAN_SELECT(cbam_weights_back);
    share_out(s.r + s.c, s.n * std::min(s.r, s.c), [&](int64_t begin, int64_t end) { weights_back(args, begin, end); });
  }
  if (spatial) add_up(args.spatial, s.n * bands(s), taps, own(kSpatialWeight));
  const std::pair<Input, double> numbers[] = {
      {kNormWeight, norm.weight}, {kNormBias, norm.bias}, {kMean, norm.mean}, {kVar, norm.var}};
  for (const auto& [input, value] : numbers) {
    if (wanted & bit(input)) *own(input) = static_cast<float>(value);
  }
  return gradients;
}

TwelveTensors cbam_backward_cpu(
    const Tensor& g_y, const Optional& g_mean, const Optional& g_var, const Tensor& x, const Optional& average,
    const Optional& maximum, const Tensor& reduce_weight, const Tensor& reduce_bias, const Tensor& expand_weight,
    const Tensor& expand_bias, const Tensor& spatial_weight, const Tensor& norm_weight, const Tensor& norm_bias,
    const Optional& mean, const Optional& var, bool batch, double eps, const Tensor& saved, int64_t wanted) {
  const Given given(x, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                    norm_weight, norm_bias, mean, var, batch, eps);
  given.check_backward(g_y, x, saved);
  const std::vector<int64_t> moments = given.own_moments();
  const Gradients g = backward(given, g_y, in_float32(g_mean, x, moments, "g_mean"),
                               in_float32(g_var, x, moments, "g_var"), x, saved, wanted);
  return in_their_dtypes(g, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                         norm_weight, norm_bias, mean, var);
}

// ---- double backward ----------------------------------------------------------------------------------------------

// g_y's gradient, then those of x to var as the backward op returns them; mean and var have none.
using ThirteenTensors = decltype(std::tuple_cat(std::tuple<Tensor>(), TwelveTensors()));

ThirteenTensors cbam_double_backward_cpu(
    const Tensor& v_in, const Optional& v_average, const Optional& v_maximum, const Tensor& g_y_in, const Tensor& x_in,
    const Optional& average, const Optional& maximum, const Tensor& reduce_weight, const Tensor& reduce_bias,
    const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& spatial_weight, const Tensor& norm_weight,
    const Tensor& norm_bias, double eps, const Tensor& saved) {
  const Given given(x_in, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
                    norm_weight, norm_bias, Optional(), Optional(), false, eps);
  given.check_backward(g_y_in, x_in, saved);
  const CbamShape& s = given.shape;
  STD_TORCH_CHECK(same_sizes(v_in, x_in) && v_in.scalar_type() == x_in.scalar_type(), "v must be as x is");
  const Tensor x = channels_last(x_in), g_y = channels_last(g_y_in), v = channels_last(v_in);
  const Tensor g_g_y = empty_channels_last(x, s.c, s.h, s.w);
  const int64_t taps = 2 * s.k * s.k, nc = s.n * s.c;
  const Gradients g = new_gradients(s, x, bit(kMean) - 1);
  const auto own = [&](Input input) { return g[input].mutable_data_ptr<float>(); };
  Work work(4 * nc + 5 * s.n * s.r + s.n * (taps + 2));
  // What v is to what was pooled: zero where that was given and nothing came back to it.
  const auto direction = [&](const Optional& v, const char* name) {
    float* const to = work.next(nc);
    if (v) {
      std::copy_n(in_float32(*v, x, {s.n, s.c}, name).const_data_ptr<float>(), nc, to);
    } else {
      std::fill_n(to, nc, 0.0f);
    }
    return to;
  };
  float *const by_average = direction(v_average, "v_average"), *const by_maximum = direction(v_maximum, "v_maximum");
  float *const hidden = work.next(s.n * s.r), *const g_hidden = work.next(4 * s.n * s.r);
  float* const g_logits = work.next(2 * nc);
  float *const spatial = work.next(s.n * taps), *const norm = work.next(s.n * 2);

  const CbamDoubleBackwardArgs args{
      s, given.weights(), saved_in(given, const_cast<float*>(saved.const_data_ptr<float>())),
      x.const_data_ptr(), g_y.const_data_ptr(), v.const_data_ptr(), g_g_y.mutable_data_ptr(), g[kX].mutable_data_ptr(),
      by_average, by_maximum, own(kAverage), own(kMaximum), hidden, g_logits, g_hidden, spatial, norm,
      own(kReduceWeight), own(kReduceBias), own(kExpandWeight), own(kExpandBias), !given.average, !given.maximum};
  share_out(s.n, s.c * given.pixels(), [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_floats(double_backward_floats(s));
    RACCGAN_SELECT(cbam_double_backward)(args, scratch.get(), begin, end);
  });
  share_out(s.r + s.c, s.n * std::min(s.r, s.c), [&](int64_t begin, int64_t end) {
    RACCGAN_SELECT(cbam_weights_double_back)(args, begin, end);
  });
  add_up(spatial, s.n, taps, own(kSpatialWeight));
  float of_norm[2];
  add_up(norm, s.n, 2, of_norm);
  *own(kNormWeight) = of_norm[0];
  *own(kNormBias) = of_norm[1];

  return std::tuple_cat(std::make_tuple(g_g_y),
                        in_their_dtypes(g, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias,
                                        spatial_weight, norm_weight, norm_bias, std::nullopt, std::nullopt));
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def(
      "cbam_native(Tensor x, Tensor? average, Tensor? maximum, Tensor reduce_weight, Tensor reduce_bias,"
      " Tensor expand_weight, Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight, Tensor norm_bias,"
      " Tensor? mean, Tensor? var, bool batch, float eps) -> (Tensor y, Tensor mean, Tensor var, Tensor saved)");
  m.def(
      "cbam_native_backward(Tensor g_y, Tensor? g_mean, Tensor? g_var, Tensor x, Tensor? average, Tensor? maximum,"
      " Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, Tensor spatial_weight,"
      " Tensor norm_weight, Tensor norm_bias, Tensor? mean, Tensor? var, bool batch, float eps, Tensor saved,"
      " int wanted) -> (Tensor x, Tensor average, Tensor maximum, Tensor reduce_weight, Tensor reduce_bias,"
      " Tensor expand_weight, Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight, Tensor norm_bias,"
      " Tensor mean, Tensor var)");
  m.def(
      "cbam_native_double_backward(Tensor v, Tensor? v_average, Tensor? v_maximum, Tensor g_y, Tensor x,"
      " Tensor? average, Tensor? maximum, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight,"
      " Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight, Tensor norm_bias, float eps, Tensor saved)"
      " -> (Tensor g_y, Tensor x, Tensor average, Tensor maximum, Tensor reduce_weight, Tensor reduce_bias,"
      " Tensor expand_weight, Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight, Tensor norm_bias,"
      " Tensor mean, Tensor var)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("cbam_native", TORCH_BOX(&raccgan::cbam_cpu));
  m.impl("cbam_native_backward", TORCH_BOX(&raccgan::cbam_backward_cpu));
  m.impl("cbam_native_double_backward", TORCH_BOX(&raccgan::cbam_double_backward_cpu));
}
