// CBAM on a CPU, the gradients of its gradient by x: what a gradient penalty differentiates again.
//
// The backward pass made d x of x and of g = dL/dy; v is what comes back to d x. Now d x is the gradient of <g, y(x)>, so
// <v, d x> is the derivative of <g, y(x + t v)> by t, at t = 0, and its own gradients are derivatives of both passes in
// the direction v. So every quantity q of cbam.cpp and cbam_backward.cpp is followed by its derivative, q' here and
// q_dot in the code:
//
//     average' = mean over p of v;    max' = mean over the ties of v          (or what came back to them, where given)
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
#include "cbam.h"

#include "cbam_gradients.h"

namespace raccgan {
namespace {

// Memory for one sample.
class Scratch {
 public:
  Scratch(const CbamShape& s, float* memory) : s_(s), at_(memory) {}
  float* channels(int64_t count = 1) { return next(count * s_.c); }
  float* pixels(int64_t count = 1) { return next(count * s_.h * s_.w); }
  float* rest() { return at_; }

 private:
  float* next(int64_t count) {
    float* const here = at_;
    at_ += rounded_up(count, kCbamLanes);
    return here;
  }

  const CbamShape& s_;
  float* at_;
};

// One sample on its way through the stages.
template <class T>
class Sample {
 public:
  Sample(const CbamDoubleBackwardArgs& args, float* memory, int64_t n)
      : args_(args), s_(args.shape), n_(n), size_(s_.h * s_.w), scratch_(s_, memory) {}

  void run() {
    pool();
    gate();
    gather();
    normalise();
    convolve_back();
    apply();
    gate_back();
    apply_back();
  }

 private:
  using Stored = typename T::Stored;

  const Stored* of(const void* tensor) const { return static_cast<const Stored*>(tensor) + n_ * size_ * s_.c; }
  Stored* of(void* tensor) const { return static_cast<Stored*>(tensor) + n_ * size_ * s_.c; }
  // The sample's row of [N, count] numbers.
  template <class Number>
  Number* row(Number* of_all, int64_t count) const {
    return of_all + n_ * count;
  }

  // sums_[k, c] = the sum over the pixels of what use(lanes, p, c, pixels, sums) adds to sums[k] for pixels.count of them.
  template <int kSums, class Use>
  void sum_by_channel(const Use& use) {
    for (int64_t i = 0; i < kSums * s_.c; ++i) sums_[i] = 0;
    for (int64_t first = 0; first < size_; first += kCbamPiece) {
      for_pixels(first, least(size_, first + kCbamPiece), [&](int64_t p, auto pixels) RACCGAN_INLINE {
        for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
          Floats sums[kSums] = {};
          use(lanes, p, c, pixels, sums);
          for (int k = 0; k < kSums; ++k) add_to(lanes, piece_ + k * s_.c + c, p - first, sums[k]);
        });
      });
      for (int64_t i = 0; i < kSums * s_.c; ++i) sums_[i] += piece_[i];
    }
  }

  void pool() {
    const Stored *const x = of(args_.x), *const v = of(args_.v);
    const float* const maximum = row(args_.saved.maximum, s_.c);
    sum_by_channel<3>([&](auto lanes, int64_t p, int64_t c, auto pixels, Floats* sums) RACCGAN_INLINE {
      const Floats max = lanes.template load<Float32>(maximum + c);
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
      if (args_.average) average[c] = sums_[c] / static_cast<float>(size_);
      if (args_.maximum) max[c] = sums_[s_.c + c] / tied_[c];
    }
  }

  void gate() {
    const CbamWeights& w = args_.weights;
    const float* const before = row(args_.saved.hidden, 3 * s_.r);
    float* const hidden = row(args_.hidden, s_.r);
    const float* const pooled[2] = {row(args_.v_average, s_.c), row(args_.v_maximum, s_.c)};
    for (int i = 0; i < 2; ++i) {
      matrix_product(w.reduce_weight, pooled[i], s_.r, s_.c, [&](auto lanes, int64_t r, Floats sum) {
        const Words passes = (Words)(lanes.template load<Float32>(before + i * s_.r + r) > 0);
        const Floats other = i == 0 ? Floats{} : lanes.template load<Float32>(hidden + r);
        lanes.template store<Float32>(hidden + r, other + select(passes, sum, Floats{}));
      });
    }
    const float* const gate = row(args_.saved.gate, s_.c);
    matrix_product(w.expand_weight, hidden, s_.c, s_.r, [&](auto lanes, int64_t c, Floats sum) {
      const Floats g = lanes.template load<Float32>(gate + c);
      lanes.template store<Float32>(gate_dot_ + c, g * (1.0f - g) * sum);
    });
  }

  void gather() {
    const Stored *const x = of(args_.x), *const g_y = of(args_.g_y), *const v = of(args_.v);
    const float *const gate = row(args_.saved.gate, s_.c), *const largest = row(args_.saved.planes, 2 * size_);
    for_lanes(size_, [&](auto pixel_lanes, int64_t block) RACCGAN_INLINE {
      enum { kTies, kMax, kMean, kFlow, kFlowDot, kSums };
      Floats found[kSums][kWidth] = {};
      for_pixels(0, least(kWidth, size_ - block), [&](int64_t p, auto pixels) RACCGAN_INLINE {
        Floats sums[kSums][pixels.count] = {};
        for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
          const Floats channel = lanes.template load<Float32>(gate + c);
          const Floats channel_dot = lanes.template load<Float32>(gate_dot_ + c);
#pragma GCC unroll 4
          for (int i = 0; i < pixels.count; ++i) {
            const int64_t at = (block + p + i) * s_.c + c;
            const Floats value = lanes.template load<T>(x + at), g = lanes.template load<T>(g_y + at);
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
      pixel_lanes.template store<Float32>(ties_ + block, ties);
      pixel_lanes.template store<Float32>(planes_dot_ + block, sums_of(found[kMax]) / ties);
      pixel_lanes.template store<Float32>(planes_dot_ + size_ + block, sums_of(found[kMean]) / static_cast<float>(s_.c));
      pixel_lanes.template store<Float32>(flow_ + block, sums_of(found[kFlow]));
      pixel_lanes.template store<Float32>(flow_dot_ + block, sums_of(found[kFlowDot]));
    });
  }

  // The mean over the pixels of what use(lanes, p) returns.
  template <class Use>
  float mean(const Use& use) const {
    Doubles sum{};
    for_lanes(size_, [&](auto lanes, int64_t p) RACCGAN_INLINE { sum += widened(lanes.keep(use(lanes, p), Floats{})); });
    double total = 0;
    for (int i = 0; i < kWidth; ++i) total += sum[i];
    return static_cast<float>(total / static_cast<double>(size_));
  }

  template <class Use>
  void for_bands(const Use& use) const {
    for (int64_t i = 0; i < bands(s_); ++i) use(Band(s_, n_ * bands(s_) + i));
  }

  // From what flows to the spatial gate to what flows to the scores, through the norm.
  void normalise() {
    float* const score_dot = normal_dot_;
    for_bands([&](const Band& band) {
      float* const planes = scratch_.rest();
      copy_plane(s_, band, planes_dot_, planes);
      copy_plane(s_, band, planes_dot_ + size_, planes + band.size);
      convolve(s_, band, 2, planes, args_.weights.spatial_weight, score_dot + band.first * s_.w);
    });
    const float* const scores = row(args_.saved.scores, size_);
    const float* const moments = row(args_.saved.moments, 2);
    const float rho = 1.0f / __builtin_sqrtf(moments[1] + args_.weights.eps), weight = args_.weights.norm_weight;
    const SpatialGate gate(args_.weights, moments);
    const auto at = [](const float* plane, auto lanes, int64_t p) RACCGAN_INLINE {
      return lanes.template load<Float32>(plane + p);
    };
    const auto normal = [&](auto lanes, int64_t p) RACCGAN_INLINE { return (at(scores, lanes, p) - moments[0]) * rho; };

    const float mean_dot = mean([&](auto lanes, int64_t p) { return at(score_dot, lanes, p); });
    const float c = mean([&](auto lanes, int64_t p) { return (at(score_dot, lanes, p) - mean_dot) * normal(lanes, p); });
    for_lanes(size_, [&](auto lanes, int64_t p) RACCGAN_INLINE {
      const Floats n_dot = (at(score_dot, lanes, p) - mean_dot - normal(lanes, p) * c) * rho;
      const Floats gated = gate(at(scores, lanes, p)), open = gated * (1.0f - gated);
      const Floats gated_dot = open * n_dot * weight, e = at(flow_, lanes, p);
      lanes.template store<Float32>(normal_dot_ + p, n_dot);
      lanes.template store<Float32>(spatial_ + p, gated);
      lanes.template store<Float32>(spatial_dot_ + p, gated_dot);
      lanes.template store<Float32>(flow_ + p, open * e);
      lanes.template store<Float32>(
          flow_dot_ + p, multiply_add((1.0f - 2.0f * gated) * gated_dot, e, open * at(flow_dot_, lanes, p)));
    });

    const float flow = mean([&](auto lanes, int64_t p) { return at(flow_, lanes, p); });
    const float flow_dot = mean([&](auto lanes, int64_t p) { return at(flow_dot_, lanes, p); });
    const float product = mean([&](auto lanes, int64_t p) { return at(flow_, lanes, p) * normal(lanes, p); });
    const float product_dot = mean([&](auto lanes, int64_t p) {
      return at(flow_dot_, lanes, p) * normal(lanes, p) + at(flow_, lanes, p) * at(normal_dot_, lanes, p);
    });
    for_lanes(size_, [&](auto lanes, int64_t p) RACCGAN_INLINE {
      const Floats n = normal(lanes, p), n_dot = at(normal_dot_, lanes, p);
      const Floats centred = at(flow_, lanes, p) - flow - n * product;
      const Floats centred_dot = at(flow_dot_, lanes, p) - flow_dot - n * product_dot - n_dot * product;
      lanes.template store<Float32>(flow_ + p, centred * (rho * weight));
      lanes.template store<Float32>(flow_dot_ + p, (centred_dot - centred * (rho * c)) * (rho * weight));
    });
    float* const of_norm = row(args_.norm, 2);
    of_norm[0] = product_dot * static_cast<float>(size_);
    of_norm[1] = flow_dot * static_cast<float>(size_);
  }

  // From what flows to the scores to what flows to the planes, and to the convolution's weights.
  void convolve_back() {
    const int64_t taps = s_.k * s_.k;
    float* const flipped = scratch_.rest();
    float* const part = flipped + 2 * taps;
    float* const d = part + 2 * taps;
    float* const weights = row(args_.spatial, 2 * taps);
    const float* const planes = row(args_.saved.planes, 2 * size_);
    flip(args_.weights.spatial_weight, s_.k, flipped);
    for (int64_t i = 0; i < 2 * taps; ++i) weights[i] = 0;
    for_bands([&](const Band& band) {
      const int64_t from = band.first * s_.w, count = (band.last - band.first) * s_.w;
      float* const in = d + band.size;
      // d s' meets the planes, and d s the planes'.
      const auto back = [&](const float* flow, const float* other_planes, float* e) {
        copy_plane(s_, band, flow, d);
        for (int plane = 0; plane < 2; ++plane) {
          convolve(s_, band, 1, d, flipped + plane * taps, e + plane * size_ + from);
          copy_plane(s_, band, other_planes + plane * size_, in + plane * band.size);
        }
        for (int64_t i = from; i < from + count; ++i) {
          e[i] /= ties_[i];
          e[size_ + i] /= static_cast<float>(s_.c);
        }
        correlate_planes(s_, band, d, in, part);
        for (int64_t i = 0; i < 2 * taps; ++i) weights[i] += part[i];
      };
      back(flow_dot_, planes, e_dot_);
      back(flow_, planes_dot_, e_);
    });
  }

  void apply() {
    const Stored *const x = of(args_.x), *const g_y = of(args_.g_y), *const v = of(args_.v);
    Stored* const y_dot = of(args_.g_g_y);
    const float *const gate = row(args_.saved.gate, s_.c), *const largest = row(args_.saved.planes, 2 * size_);
    sum_by_channel<2>([&](auto lanes, int64_t p, int64_t c, auto pixels, Floats* sums) RACCGAN_INLINE {
      const Floats channel = lanes.template load<Float32>(gate + c);
      const Floats channel_dot = lanes.template load<Float32>(gate_dot_ + c);
#pragma GCC unroll 4
      for (int i = 0; i < pixels.count; ++i) {
        const int64_t at = (p + i) * s_.c + c;
        const Floats value = lanes.template load<T>(x + at), g = lanes.template load<T>(g_y + at);
        const Floats direction = lanes.template load<T>(v + at);
        const Floats u = value * channel, u_dot = multiply_add(direction, channel, value * channel_dot);
        const Words is_max = (Words)(u == all(largest[p + i]));
        const Floats d = to_gated(g, is_max, spatial_, e_, p + i);
        sums[0] = multiply_add(value, d, sums[0]);
        sums[1] = multiply_add(direction, d, multiply_add(value, to_gated(g, is_max, spatial_dot_, e_dot_, p + i), sums[1]));
        lanes.template store<T>(y_dot + at, multiply_add(u_dot, all(spatial_[p + i]), u * spatial_dot_[p + i]));
      }
    });
  }

  // d u at a pixel, or d u'.
  RACCGAN_INLINE Floats to_gated(Floats g, Words is_max, const float* spatial, const float* e, int64_t p) const {
    return multiply_add(g, all(spatial[p]), select(is_max, all(e[p]), Floats{}) + e[size_ + p]);
  }

  void gate_back() {
    const CbamWeights& w = args_.weights;
    const float* const gate = row(args_.saved.gate, s_.c);
    float* const logits = row(args_.g_logits, 2 * s_.c);
    for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
      const auto at = [&](const float* row) RACCGAN_INLINE { return lanes.template load<Float32>(row + c); };
      const Floats g = at(gate), open = g * (1.0f - g), d = at(sums_);
      lanes.template store<Float32>(logits + c, d * open);
      lanes.template store<Float32>(
          logits + s_.c + c, multiply_add((1.0f - 2.0f * g) * at(gate_dot_), d, at(sums_ + s_.c) * open));
    });
    const float* const before = row(args_.saved.hidden, 3 * s_.r);
    float* const hidden = row(args_.g_hidden, 4 * s_.r);
    for (int i = 0; i < 2; ++i) {  // the gradient, then its derivative
      float* const here = hidden + 2 * i * s_.r;
      transposed_product(w.expand_weight, logits + i * s_.c, s_.c, s_.r, here);
      for (int64_t r = 0; r < s_.r; ++r) {
        const float g = here[r];
        here[r] = before[r] > 0 ? g : 0;
        here[s_.r + r] = before[s_.r + r] > 0 ? g : 0;
      }
    }
    transposed_product(w.reduce_weight, hidden + 2 * s_.r, s_.r, s_.c, row(args_.g_average, s_.c));
    transposed_product(w.reduce_weight, hidden + 3 * s_.r, s_.r, s_.c, row(args_.g_maximum, s_.c));
  }

  void apply_back() {
    const Stored *const x = of(args_.x), *const g_y = of(args_.g_y);
    Stored* const g_x = of(args_.g_x);
    const float *const gate = row(args_.saved.gate, s_.c), *const largest = row(args_.saved.planes, 2 * size_);
    const float* const maximum = row(args_.saved.maximum, s_.c);
    const float *const g_average = row(args_.g_average, s_.c), *const g_maximum = row(args_.g_maximum, s_.c);
    const float over = 1.0f / static_cast<float>(size_);
    for_pixels(0, size_, [&](int64_t p, auto pixels) RACCGAN_INLINE {
      for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
        const Floats channel = lanes.template load<Float32>(gate + c), max = lanes.template load<Float32>(maximum + c);
        const Floats channel_dot = lanes.template load<Float32>(gate_dot_ + c);
        Floats from_average{}, from_max{};
        if (args_.average) from_average = lanes.template load<Float32>(g_average + c) * over;
        if (args_.maximum) {
          const Floats ties = lanes.keep(lanes.template load<Float32>(tied_ + c), all(1.0f));
          from_max = lanes.template load<Float32>(g_maximum + c) / ties;
        }
#pragma GCC unroll 4
        for (int i = 0; i < pixels.count; ++i) {
          const int64_t at = (p + i) * s_.c + c;
          const Floats value = lanes.template load<T>(x + at), g = lanes.template load<T>(g_y + at);
          const Words is_max = (Words)(value * channel == all(largest[p + i]));
          const Floats d = to_gated(g, is_max, spatial_, e_, p + i);
          const Floats d_dot = to_gated(g, is_max, spatial_dot_, e_dot_, p + i);
          const Floats through = multiply_add(channel, d_dot, channel_dot * d);
          lanes.template store<T>(
              g_x + at, through + from_average + select((Words)(value == max), from_max, Floats{}));
        }
      });
    });
  }

  const CbamDoubleBackwardArgs& args_;
  const CbamShape& s_;
  const int64_t n_, size_;
  Scratch scratch_;
  // By channel. sums_: of pool(), v, v where x is the max, and where it is; of apply(), d gate and d gate'.
  float *const sums_ = scratch_.channels(3), *const tied_ = sums_ + 2 * s_.c;
  float* const piece_ = scratch_.channels(3);
  float* const gate_dot_ = scratch_.channels();
  // By pixel.
  float* const ties_ = scratch_.pixels();
  float* const planes_dot_ = scratch_.pixels(2);
  float* const normal_dot_ = scratch_.pixels();
  float *const spatial_ = scratch_.pixels(), *const spatial_dot_ = scratch_.pixels();
  float *const flow_ = scratch_.pixels(), *const flow_dot_ = scratch_.pixels();
  float *const e_ = scratch_.pixels(2), *const e_dot_ = scratch_.pixels(2);  // e_max, e_mean
};

template <class T>
void double_backward_as(const CbamDoubleBackwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) Sample<T>(args, scratch, n).run();
}

}  // namespace

namespace RACCGAN_TARGET {

void cbam_double_backward(const CbamDoubleBackwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto run = args.shape.dtype == Dtype::kFloat32 ? double_backward_as<Float32> : double_backward_as<BFloat16>;
  run(args, scratch, begin, end);
}

// A weight's first gradient is a sum of products of what flows to a layer's output with its input. The derivative of
// each has two terms.
void cbam_weights_double_back(const CbamDoubleBackwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  for (int64_t row = begin; row < end; ++row) {
    if (row < s.r) {
      float* const to = args.g_reduce_weight + row * s.c;
      const float* const flow = args.g_hidden + row;
      const float* const flow_dot = flow + 2 * s.r;
      outer_sum(flow_dot, 4 * s.r, args.saved.average, s.c, s.n, s.c, false, to);
      outer_sum(flow_dot + s.r, 4 * s.r, args.saved.maximum, s.c, s.n, s.c, true, to);
      outer_sum(flow, 4 * s.r, args.v_average, s.c, s.n, s.c, true, to);
      outer_sum(flow + s.r, 4 * s.r, args.v_maximum, s.c, s.n, s.c, true, to);
      args.g_reduce_bias[row] = strided_sum(flow_dot, 4 * s.r, s.n) + strided_sum(flow_dot + s.r, 4 * s.r, s.n);
    } else {
      const int64_t c = row - s.r;
      float* const to = args.g_expand_weight + c * s.r;
      const float* const flow = args.g_logits + c;
      const float* const flow_dot = flow + s.c;
      outer_sum(flow_dot, 2 * s.c, args.saved.hidden + 2 * s.r, 3 * s.r, s.n, s.r, false, to);
      outer_sum(flow, 2 * s.c, args.hidden, s.r, s.n, s.r, true, to);
      args.g_expand_bias[c] = 2 * strided_sum(flow_dot, 2 * s.c, s.n);
    }
  }
}

}  // namespace RACCGAN_TARGET
}  // namespace raccgan
