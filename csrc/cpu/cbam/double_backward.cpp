// CBAM on a CPU, the gradients of its gradient by x: what a gradient penalty differentiates again.
//
// The backward pass made d x of x and of g = dL/dy; v is what comes back to d x. d x is the gradient of <g, y(x)>, so
// <v, d x> is the derivative of <g, y(x + t v)> by t, at t = 0, and its own gradients are derivatives of both passes in
// the direction v. So every quantity q of forward.cpp and backward.cpp is followed by its derivative, q' here and
// q_dot in the code:
//
//     average' = mean over p of v;    max' = mean over the ties of v
//     gate'    = gate (1 - gate) MLP'(average', max')
//     u'       = v gate + x gate';    planes' = those of u', the max's at its ties;    s' = their convolution
//     n'       = rho (s' - mean' - n c)     with n = rho (s - mean), rho = 1 / deviation, c = mean of n s'
//     spatial' = open weight n'             with open = spatial (1 - spatial), weight the norm's
//
//     e        = sum over c of g u;         e' of g u'
//     flow     = open e;                    flow' = open e' + (1 - 2 spatial) spatial' e
//     d s      = rho weight (flow - F - n M),    F = mean of flow, M = mean of flow n
//     d s'     = rho weight (flow' - F' - n M' - n' M - rho c (flow - F - n M))
//     d u      = g spatial + e_mean + e_max [u is the pixel's max];    d u' likewise with spatial', e_mean', e_max'
//     d gate   = sum over p of x d u;       d gate' of x d u' + v d u;      through the MLP to d average', d max'
//
//     of g:  y'   = u' spatial + u spatial'
//     of x:  d x' = gate d u' + gate' d u + d average' / P + d max' / ties [x is the channel's max]
//     of a weight: the derivative of its first gradient
//
// For norm "instance", which couples no samples: a thread takes a sample through all stages, four sweeps over it.
#include "planes.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
struct Pass : CbamDoubleBackwardArgs {
  const int64_t n = shape.n, taps = 2 * shape.k * shape.k;
  const Memory<> v_average{n * shape.c}, v_maximum{n * shape.c};  // the derivatives of average and maximum
  const Memory<> hidden{n * shape.r};  // the derivative of the sum of both hidden layers
  const Memory<> grad_logits{2 * n * shape.c};  // [N, 2, C], to the argument of the channel gate's sigmoid; derivative
  const Memory<> grad_hidden{4 * n * shape.r};  // [N, 4, R], to the arguments of both hidden layers' ReLU; derivatives
  const Memory<> grad_spatial{n * taps}, grad_norm{2 * n};  // by sample, the latter of norm_weight and norm_bias

  explicit Pass(const CbamDoubleBackwardArgs& args) : CbamDoubleBackwardArgs(args) {}
};

// Takes samples, of element type T, through all stages, one after the other in the same memory.
template <class T> class Sample {
 public:
  explicit Sample(const Pass& pass) : args_(pass) {}

  void run(int64_t n) {
    n_ = n;
    pool();
    gate();
    gather();
    normalise();
    convolve_back_to_planes();
    apply();
    gate_back();
    apply_back();
  }

 private:
  using Stored = typename T::Stored;

  // The sample's part of a tensor like x, and of [N, count] numbers.
  Stored* of(const void* tensor) const { return static_cast<Stored*>(const_cast<void*>(tensor)) + n_ * size_ * s_.c; }
  float* row(float* of_all, int64_t count) const { return of_all + n_ * count; }

  // sums_[k, c] = the sum over the pixels of what use(lanes, p, c, pixels, sums) adds to sums[k] for some of them.
  template <int kSums, class Use> void sum_by_channel(const Use& use) {
    for (int64_t i = 0; i < kSums * s_.c; ++i) sums_[i] = 0;
    for (int64_t first = 0; first < size_; first += kMostPixels) {
      for_values(first, least(size_, first + kMostPixels), s_.c,
                 [&](auto lanes, int64_t p, int64_t c, auto pixels) RACCGAN_INLINE {
        Floats sums[kSums] = {};
        use(lanes, p, c, pixels, sums);
        for (int k = 0; k < kSums; ++k) add_to(lanes, chunk_ + k * s_.c + c, p - first, sums[k]);
      });
      for (int64_t i = 0; i < kSums * s_.c; ++i) sums_[i] += chunk_[i];
    }
  }

  void pool() {
    const Stored *const x = of(args_.x), *const v = of(args_.v);
    const float* const maximum = row(args_.saved.maximum, s_.c);
    sum_by_channel<3>([&](auto lanes, int64_t p, int64_t c, auto pixels, Floats* sums) RACCGAN_INLINE {
      const Floats max = lanes.load(maximum + c);
#pragma GCC unroll 4
      for (int i = 0; i < pixels.count; ++i) {
        const int64_t at = (p + i) * s_.c + c;
        const Floats direction = lanes.template load<T>(v + at);
        const Words is_max = (Words)(lanes.template load<T>(x + at) == max);
        sums[0] += direction;
        sums[1] += select(is_max, direction, Floats{});
        sums[2] += select(is_max, all(1.0f), Floats{});
      }
    });
    float *const average = row(args_.v_average, s_.c), *const max = row(args_.v_maximum, s_.c);
    for (int64_t c = 0; c < s_.c; ++c) {
      average[c] = sums_[c] / static_cast<float>(size_);
      max[c] = sums_[s_.c + c] / tied_[c];
    }
  }

  void gather() {
    const Stored *const x = of(args_.x), *const grad_y = of(args_.grad_y), *const v = of(args_.v);
    const float *const gate = row(args_.saved.gate, s_.c), *const largest = row(args_.saved.planes, 2 * size_);
    for_lanes(size_, [&](auto pixel_lanes, int64_t block) RACCGAN_INLINE {
      enum { kTies, kMax, kMean, kFlow, kFlowDot, kSums };
      Floats found[kSums][kWidth] = {};
      for_pixels(0, least(kWidth, size_ - block), [&](int64_t p, auto pixels) RACCGAN_INLINE {
        Floats sums[kSums][pixels.count] = {};
        for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
          const Floats channel = lanes.load(gate + c), channel_dot = lanes.load(gate_dot_ + c);
#pragma GCC unroll 4
          for (int i = 0; i < pixels.count; ++i) {
            const int64_t at = (block + p + i) * s_.c + c;
            const Floats value = lanes.template load<T>(x + at), g = lanes.template load<T>(grad_y + at);
            const Floats u = value * channel;
            const Floats u_dot = multiply_add(lanes.template load<T>(v + at), channel, value * channel_dot);
            const Words is_max = (Words)(u == all(largest[block + p + i]));
            sums[kTies][i] += lanes.keep(select(is_max, all(1.0f), Floats{}), Floats{});
            sums[kMax][i] += select(is_max, u_dot, Floats{});
            sums[kMean][i] += u_dot;
            sums[kFlow][i] = multiply_add(g, u, sums[kFlow][i]);
            sums[kFlowDot][i] = multiply_add(g, u_dot, sums[kFlowDot][i]);
          }
        });
        for (int k = 0; k < kSums; ++k) {
          for (int i = 0; i < pixels.count; ++i) found[k][p + i] = sums[k][i];
        }
      });
      const Floats ties = pixel_lanes.keep(sums_of(found[kTies]), all(1.0f));
      pixel_lanes.store(ties_ + block, ties);
      pixel_lanes.store(planes_dot_ + block, sums_of(found[kMax]) / ties);
      pixel_lanes.store(planes_dot_ + size_ + block, sums_of(found[kMean]) / static_cast<float>(s_.c));
      pixel_lanes.store(flow_ + block, sums_of(found[kFlow]));
      pixel_lanes.store(flow_dot_ + block, sums_of(found[kFlowDot]));
    });
  }

  void gate() {
    const float* const before = row(args_.saved.hidden, 3 * s_.r);
    float* const hidden = row(args_.hidden, s_.r);
    const float* const pooled[2] = {row(args_.v_average, s_.c), row(args_.v_maximum, s_.c)};
    for (int i = 0; i < 2; ++i) {
      matrix_product(args_.weights.reduce_weight, pooled[i], s_.r, s_.c, [&](auto lanes, int64_t r, Floats sum) {
        const Words passes = (Words)(lanes.load(before + i * s_.r + r) > 0);
        const Floats other = i == 0 ? Floats{} : lanes.load(hidden + r);
        lanes.store(hidden + r, other + select(passes, sum, Floats{}));
      });
    }
    const float* const gate = row(args_.saved.gate, s_.c);
    matrix_product(args_.weights.expand_weight, hidden, s_.c, s_.r, [&](auto lanes, int64_t c, Floats sum) {
      const Floats g = lanes.load(gate + c);
      lanes.store(gate_dot_ + c, g * (1.0f - g) * sum);
    });
  }

  // The mean over the pixels of what use(lanes, p) returns.
  template <class Use> float mean(const Use& use) const {
    Doubles sum{};
    for_lanes(size_,
              [&](auto lanes, int64_t p) RACCGAN_INLINE { sum += widened(lanes.keep(use(lanes, p), Floats{})); });
    return static_cast<float>(sum_of_lanes(sum) / static_cast<double>(size_));
  }

  // From what flows to the spatial gate to what flows to the scores, through the norm.
  void normalise() {
    float* const score_dot = normal_dot_;
    const Memory<> scratch(tile_floats(s_));
    for (int64_t i = 0; i < tiles(s_); ++i) {
      const Tile tile(s_, n_ * tiles(s_) + i);
      copy_planes(s_, tile, planes_dot_, scratch);
      convolve(s_, tile, 2, scratch, args_.weights.spatial_weight, score_dot + tile.first * s_.w);
    }
    const float *const scores = row(args_.saved.scores, size_), *const moments = row(args_.saved.moments, 2);
    const float rho = 1.0f / __builtin_sqrtf(moments[1] + args_.weights.eps), weight = *args_.weights.norm_weight;
    const CbamSpatialGate gate = spatial_gate(args_, n_);
    const auto at = [](const float* plane, auto lanes, int64_t p) RACCGAN_INLINE { return lanes.load(plane + p); };
    const auto normal = [&](auto lanes, int64_t p) RACCGAN_INLINE { return (at(scores, lanes, p) - moments[0]) * rho; };

    const float mean_dot = mean([&](auto lanes, int64_t p) { return at(score_dot, lanes, p); });
    const float c =
        mean([&](auto lanes, int64_t p) { return (at(score_dot, lanes, p) - mean_dot) * normal(lanes, p); });
    for_lanes(size_, [&](auto lanes, int64_t p) RACCGAN_INLINE {
      const Floats n_dot = (at(score_dot, lanes, p) - mean_dot - normal(lanes, p) * c) * rho;
      const Floats spatial = gated(gate, at(scores, lanes, p)), open = spatial * (1.0f - spatial);
      const Floats spatial_dot = open * n_dot * weight, e = at(flow_, lanes, p);
      lanes.store(normal_dot_ + p, n_dot);
      lanes.store(spatial_ + p, spatial);
      lanes.store(spatial_dot_ + p, spatial_dot);
      lanes.store(flow_ + p, open * e);
      lanes.store(flow_dot_ + p,
                  multiply_add((1.0f - 2.0f * spatial) * spatial_dot, e, open * at(flow_dot_, lanes, p)));
    });

    const float flow = mean([&](auto lanes, int64_t p) { return at(flow_, lanes, p); });
    const float flow_dot = mean([&](auto lanes, int64_t p) { return at(flow_dot_, lanes, p); });
    const float product = mean([&](auto lanes, int64_t p) { return at(flow_, lanes, p) * normal(lanes, p); });
    const float product_dot = mean([&](auto lanes, int64_t p) {
      return at(flow_dot_, lanes, p) * normal(lanes, p) + at(flow_, lanes, p) * at(normal_dot_, lanes, p);
    });
    for_lanes(size_, [&](auto lanes, int64_t p) RACCGAN_INLINE {
      const Floats n = normal(lanes, p), n_dot = at(normal_dot_, lanes, p);
      const Floats centered = at(flow_, lanes, p) - flow - n * product;
      const Floats centered_dot = at(flow_dot_, lanes, p) - flow_dot - n * product_dot - n_dot * product;
      lanes.store(flow_ + p, centered * (rho * weight));
      lanes.store(flow_dot_ + p, (centered_dot - centered * (rho * c)) * (rho * weight));
    });
    float* const of_norm = row(args_.grad_norm, 2);
    of_norm[0] = product_dot * static_cast<float>(size_);
    of_norm[1] = flow_dot * static_cast<float>(size_);
  }

  // From what flows to the scores to what flows to the planes, and to the convolution's weights.
  void convolve_back_to_planes() {
    const Memory<> scratch(tile_floats(s_));
    float *const flipped = scratch, *const part = scratch + args_.taps, *const d = part + args_.taps;
    float* const weights = row(args_.grad_spatial, args_.taps);
    flip(args_.weights.spatial_weight, s_.k, flipped);
    memset(weights, 0, args_.taps * sizeof *weights);
    for (int64_t i = 0; i < tiles(s_); ++i) {
      const Tile tile(s_, n_ * tiles(s_) + i);
      // d s' meets the planes, and d s the planes'.
      const auto back = [&](const float* flow, const float* other_planes, float* e) {
        copy_plane(s_, tile, flow, d);
        convolve_back(s_, tile, d, flipped, ties_, e);
        correlate_planes(s_, tile, d, other_planes, d + tile.size, part);
        for (int64_t i = 0; i < args_.taps; ++i) weights[i] += part[i];
      };
      back(flow_dot_, row(args_.saved.planes, 2 * size_), e_dot_);
      back(flow_, planes_dot_, e_);
    }
  }

  void gate_back() {
    const float* const gate = row(args_.saved.gate, s_.c);
    float *const logits = row(args_.grad_logits, 2 * s_.c), *const hidden = row(args_.grad_hidden, 4 * s_.r);
    for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
      const auto at = [&](const float* row) RACCGAN_INLINE { return lanes.load(row + c); };
      const Floats g = at(gate), open = g * (1.0f - g), d = at(sums_);
      lanes.store(logits + c, d * open);
      lanes.store(logits + s_.c + c, multiply_add((1.0f - 2.0f * g) * at(gate_dot_), d, at(sums_ + s_.c) * open));
    });
    for (int i = 0; i < 2; ++i)
      hidden_back(args_, n_, logits + i * s_.c, hidden + 2 * i * s_.r);  // d, then its derivative
    pooled_back(args_, hidden + 2 * s_.r, grad_average_, grad_maximum_);
  }

  void apply() {
    const Stored *const x = of(args_.x), *const grad_y = of(args_.grad_y), *const v = of(args_.v);
    Stored* const y_dot = of(args_.grad_grad_y);
    const float *const gate = row(args_.saved.gate, s_.c), *const largest = row(args_.saved.planes, 2 * size_);
    sum_by_channel<2>([&](auto lanes, int64_t p, int64_t c, auto pixels, Floats* sums) RACCGAN_INLINE {
      const Floats channel = lanes.load(gate + c), channel_dot = lanes.load(gate_dot_ + c);
#pragma GCC unroll 4
      for (int i = 0; i < pixels.count; ++i) {
        const int64_t at = (p + i) * s_.c + c;
        const Floats value = lanes.template load<T>(x + at), g = lanes.template load<T>(grad_y + at);
        const Floats direction = lanes.template load<T>(v + at);
        const Floats u = value * channel, u_dot = multiply_add(direction, channel, value * channel_dot);
        const Words is_max = (Words)(u == all(largest[p + i]));
        const Floats d = to_gated(g, is_max, spatial_, e_, p + i);
        sums[0] = multiply_add(value, d, sums[0]);
        const Floats d_dot = to_gated(g, is_max, spatial_dot_, e_dot_, p + i);
        sums[1] = multiply_add(direction, d, multiply_add(value, d_dot, sums[1]));
        lanes.template store<T>(y_dot + at, multiply_add(u_dot, all(spatial_[p + i]), u * spatial_dot_[p + i]));
      }
    });
  }

  RACCGAN_INLINE Floats to_gated(Floats g, Words is_max, const float* spatial, const float* e, int64_t p) const {
    return multiply_add(g, all(spatial[p]), select(is_max, all(e[p]), Floats{}) + e[size_ + p]);
  }

  void apply_back() {
    const Stored *const x = of(args_.x), *const grad_y = of(args_.grad_y);
    Stored* const grad_x = of(args_.gradients.x);
    const float *const gate = row(args_.saved.gate, s_.c), *const largest = row(args_.saved.planes, 2 * size_);
    const float* const maximum = row(args_.saved.maximum, s_.c);
    const float over = 1.0f / static_cast<float>(size_);
    for_values(0, size_, s_.c, [&](auto lanes, int64_t p, int64_t c, auto pixels) RACCGAN_INLINE {
      const Floats channel = lanes.load(gate + c), channel_dot = lanes.load(gate_dot_ + c);
      const Floats max = lanes.load(maximum + c);
      const Floats from_average = lanes.load(grad_average_ + c) * over;
      const Floats ties = lanes.keep(lanes.load(tied_ + c), all(1.0f));
      const Floats from_max = lanes.load(grad_maximum_ + c) / ties;
#pragma GCC unroll 4
      for (int i = 0; i < pixels.count; ++i) {
        const int64_t at = (p + i) * s_.c + c;
        const Floats value = lanes.template load<T>(x + at), g = lanes.template load<T>(grad_y + at);
        const Words is_max = (Words)(value * channel == all(largest[p + i]));
        const Floats d = to_gated(g, is_max, spatial_, e_, p + i);
        const Floats d_dot = to_gated(g, is_max, spatial_dot_, e_dot_, p + i);
        const Floats through = multiply_add(channel, d_dot, channel_dot * d);
        lanes.template store<T>(grad_x + at,
                                through + from_average + select((Words)(value == max), from_max, Floats{}));
      }
    });
  }

  const Pass& args_;
  const CbamShape& s_ = args_.shape;
  const int64_t size_ = pixels(s_);
  int64_t n_ = 0;
  // By channel. sums_: of pool(), v, v where x is the max, and where it is; of apply(), d gate and d gate'.
  const Memory<> sums_{3 * s_.c}, chunk_{3 * s_.c}, gate_dot_{s_.c}, grad_average_{s_.c}, grad_maximum_{s_.c};
  float* const tied_ = sums_ + 2 * s_.c;
  // By pixel. e: e_max, e_mean.
  const Memory<> ties_{size_}, planes_dot_{2 * size_}, normal_dot_{size_}, spatial_{size_}, spatial_dot_{size_};
  const Memory<> flow_{size_}, flow_dot_{size_}, e_{2 * size_}, e_dot_{2 * size_};
};

// A weight's first gradient is a sum of products of what flows to a layer's output with its input. The derivative of
// each has two terms.
void weights_back(const Pass& args, int64_t row) {
  const CbamShape& s = args.shape;
  if (row < s.r) {
    float* const to = args.gradients.reduce_weight + row * s.c;
    const float *const flow = args.grad_hidden + row, *const flow_dot = flow + 2 * s.r;
    outer_sum(flow_dot, 4 * s.r, args.saved.average, s.c, s.n, s.c, false, to);
    outer_sum(flow_dot + s.r, 4 * s.r, args.saved.maximum, s.c, s.n, s.c, true, to);
    outer_sum(flow, 4 * s.r, args.v_average, s.c, s.n, s.c, true, to);
    outer_sum(flow + s.r, 4 * s.r, args.v_maximum, s.c, s.n, s.c, true, to);
    args.gradients.reduce_bias[row] = strided_sum(flow_dot, 4 * s.r, s.n) + strided_sum(flow_dot + s.r, 4 * s.r, s.n);
  } else {
    const int64_t c = row - s.r;
    float* const to = args.gradients.expand_weight + c * s.r;
    const float *const flow = args.grad_logits + c, *const flow_dot = flow + s.c;
    outer_sum(flow_dot, 2 * s.c, args.saved.hidden + 2 * s.r, 3 * s.r, s.n, s.r, false, to);
    outer_sum(flow, 2 * s.c, args.hidden, s.r, s.n, s.r, true, to);
    args.gradients.expand_bias[c] = 2 * strided_sum(flow_dot, 2 * s.c, s.n);
  }
}

template <class T> void double_backward(const CbamDoubleBackwardArgs& args) {
  const CbamShape& s = args.shape;
  const Pass pass(args);
  share_out(s.n, s.c * pixels(s), [&](int64_t begin, int64_t end) {
    Sample<T> sample(pass);
    for (int64_t n = begin; n < end; ++n) sample.run(n);
  });
  for_rows(s, [&](int64_t row) { weights_back(pass, row); });
  add_up(pass.grad_spatial, s.n, pass.taps, args.gradients.spatial_weight);
  *args.gradients.norm_weight = strided_sum(pass.grad_norm, 2, s.n);
  *args.gradients.norm_bias = strided_sum(pass.grad_norm + 1, 2, s.n);
}
}  // namespace

void cbam_double_backward(const CbamDoubleBackwardArgs& args) {
  RACCGAN_OF_DTYPE(args.shape.dtype, double_backward)(args);
}
}  // namespace raccgan::RACCGAN_TARGET
