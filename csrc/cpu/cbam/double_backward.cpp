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
#include "double_backward_sample.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
// The stages that read x, of element type T.
template <class T> class SampleOf : Sample {
 public:
  SampleOf(const CbamDoubleBackwardArgs& args, float* memory, int64_t n) : Sample(args, memory, n) {}

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

  // sums_[k, c] = the sum over the pixels of what use(lanes, p, c, pixels, sums) adds to sums[k] for pixels.count
  // of them.
  template <int kSums, class Use> void sum_by_channel(const Use& use) {
    for (int64_t i = 0; i < kSums * s_.c; ++i) sums_[i] = 0;
    for (int64_t first = 0; first < size_; first += kCbamChunk) {
      for_pixels(first, least(size_, first + kCbamChunk), [&](int64_t p, auto pixels) RACCGAN_INLINE {
        for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
          Floats sums[kSums] = {};
          use(lanes, p, c, pixels, sums);
          for (int k = 0; k < kSums; ++k) add_to(lanes, chunk_ + k * s_.c + c, p - first, sums[k]);
        });
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
          const Floats channel = lanes.load(gate + c);
          const Floats channel_dot = lanes.load(gate_dot_ + c);
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
      const Floats mean = sums_of(found[kMean]) / static_cast<float>(s_.c);
      pixel_lanes.store(planes_dot_ + size_ + block, mean);
      pixel_lanes.store(flow_ + block, sums_of(found[kFlow]));
      pixel_lanes.store(flow_dot_ + block, sums_of(found[kFlowDot]));
    });
  }

  void apply() {
    const Stored *const x = of(args_.x), *const grad_y = of(args_.grad_y), *const v = of(args_.v);
    Stored* const y_dot = of(args_.grad_grad_y);
    const float *const gate = row(args_.saved.gate, s_.c), *const largest = row(args_.saved.planes, 2 * size_);
    sum_by_channel<2>([&](auto lanes, int64_t p, int64_t c, auto pixels, Floats* sums) RACCGAN_INLINE {
      const Floats channel = lanes.load(gate + c);
      const Floats channel_dot = lanes.load(gate_dot_ + c);
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
    const float* const grad_average = row(args_.grad_average, s_.c);
    const float* const grad_maximum = row(args_.grad_maximum, s_.c);
    const float over = 1.0f / static_cast<float>(size_);
    for_pixels(0, size_, [&](int64_t p, auto pixels) RACCGAN_INLINE {
      for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
        const Floats channel = lanes.load(gate + c);
        const Floats max = lanes.load(maximum + c);
        const Floats channel_dot = lanes.load(gate_dot_ + c);
        const Floats from_average = lanes.load(grad_average + c) * over;
        const Floats ties = lanes.keep(lanes.load(tied_ + c), all(1.0f));
        const Floats from_max = lanes.load(grad_maximum + c) / ties;
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
    });
  }
};

template <class T>
void double_backward_as(const CbamDoubleBackwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) SampleOf<T>(args, scratch, n).run();
}
}  // namespace

void cbam_double_backward(const CbamDoubleBackwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  RACCGAN_OF_DTYPE(args.shape.dtype, double_backward_as)(args, scratch, begin, end);
}

// A weight's first gradient is a sum of products of what flows to a layer's output with its input. The derivative of
// each has two terms.
void cbam_weights_double_back(const CbamDoubleBackwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  for (int64_t row = begin; row < end; ++row) {
    if (row < s.r) {
      float* const to = args.gradients.reduce_weight + row * s.c;
      const float* const flow = args.grad_hidden + row;
      const float* const flow_dot = flow + 2 * s.r;
      outer_sum(flow_dot, 4 * s.r, args.saved.average, s.c, s.n, s.c, false, to);
      outer_sum(flow_dot + s.r, 4 * s.r, args.saved.maximum, s.c, s.n, s.c, true, to);
      outer_sum(flow, 4 * s.r, args.v_average, s.c, s.n, s.c, true, to);
      outer_sum(flow + s.r, 4 * s.r, args.v_maximum, s.c, s.n, s.c, true, to);
      args.gradients.reduce_bias[row] = strided_sum(flow_dot, 4 * s.r, s.n) + strided_sum(flow_dot + s.r, 4 * s.r, s.n);
    } else {
      const int64_t c = row - s.r;
      float* const to = args.gradients.expand_weight + c * s.r;
      const float* const flow = args.grad_logits + c;
      const float* const flow_dot = flow + s.c;
      outer_sum(flow_dot, 2 * s.c, args.saved.hidden + 2 * s.r, 3 * s.r, s.n, s.r, false, to);
      outer_sum(flow, 2 * s.c, args.hidden, s.r, s.n, s.r, true, to);
      args.gradients.expand_bias[c] = 2 * strided_sum(flow_dot, 2 * s.c, s.n);
    }
  }
}
}  // namespace raccgan::RACCGAN_TARGET
