// One sample on its way through CBAM's double backward pass (double_backward.cpp): its scratch memory, and the stages
// that do not read x.
#pragma once

#include "planes.h"

namespace raccgan { namespace {
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

class Sample {
 protected:
  Sample(const CbamDoubleBackwardArgs& args, float* memory, int64_t n)
      : args_(args), s_(args.shape), n_(n), size_(s_.h * s_.w), scratch_(s_, memory) {}

  // The sample's row of [N, count] numbers.
  template <class Number> Number* row(Number* of_all, int64_t count) const { return of_all + n_ * count; }

  void gate() {
    const CbamWeights& w = args_.weights;
    const float* const before = row(args_.saved.hidden, 3 * s_.r);
    float* const hidden = row(args_.hidden, s_.r);
    const float* const pooled[2] = {row(args_.v_average, s_.c), row(args_.v_maximum, s_.c)};
    for (int i = 0; i < 2; ++i) {
      matrix_product(w.reduce_weight, pooled[i], s_.r, s_.c, [&](auto lanes, int64_t r, Floats sum) {
        const Words passes = (Words)(lanes.load(before + i * s_.r + r) > 0);
        const Floats other = i == 0 ? Floats{} : lanes.load(hidden + r);
        lanes.store(hidden + r, other + select(passes, sum, Floats{}));
      });
    }
    const float* const gate = row(args_.saved.gate, s_.c);
    matrix_product(w.expand_weight, hidden, s_.c, s_.r, [&](auto lanes, int64_t c, Floats sum) {
      const Floats g = lanes.load(gate + c);
      lanes.store(gate_dot_ + c, g * (1.0f - g) * sum);
    });
  }

  // The mean over the pixels of what use(lanes, p) returns.
  template <class Use> float mean(const Use& use) const {
    Doubles sum{};
    for_lanes(size_,
              [&](auto lanes, int64_t p) RACCGAN_INLINE { sum += widened(lanes.keep(use(lanes, p), Floats{})); });
    double total = 0;
    for (int i = 0; i < kWidth; ++i) total += sum[i];
    return static_cast<float>(total / static_cast<double>(size_));
  }

  template <class Use> void for_tiles(const Use& use) const {
    for (int64_t i = 0; i < tiles(s_); ++i) use(Tile(s_, n_ * tiles(s_) + i));
  }

  // From what flows to the spatial gate to what flows to the scores, through the norm.
  void normalise() {
    float* const score_dot = normal_dot_;
    for_tiles([&](const Tile& tile) {
      float* const planes = scratch_.rest();
      copy_plane(s_, tile, planes_dot_, planes);
      copy_plane(s_, tile, planes_dot_ + size_, planes + tile.size);
      convolve(s_, tile, 2, planes, args_.weights.spatial_weight, score_dot + tile.first * s_.w);
    });
    const float* const scores = row(args_.saved.scores, size_);
    const float* const moments = row(args_.saved.moments, 2);
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
  void convolve_back() {
    const int64_t taps = s_.k * s_.k;
    float* const flipped = scratch_.rest();
    float* const part = flipped + 2 * taps;
    float* const d = part + 2 * taps;
    float* const weights = row(args_.grad_spatial, 2 * taps);
    const float* const planes = row(args_.saved.planes, 2 * size_);
    flip(args_.weights.spatial_weight, s_.k, flipped);
    for (int64_t i = 0; i < 2 * taps; ++i) weights[i] = 0;
    for_tiles([&](const Tile& tile) {
      const int64_t from = tile.first * s_.w, count = (tile.last - tile.first) * s_.w;
      float* const in = d + tile.size;
      // d s' meets the planes, and d s the planes'.
      const auto back = [&](const float* flow, const float* other_planes, float* e) {
        copy_plane(s_, tile, flow, d);
        for (int plane = 0; plane < 2; ++plane) {
          convolve(s_, tile, 1, d, flipped + plane * taps, e + plane * size_ + from);
          copy_plane(s_, tile, other_planes + plane * size_, in + plane * tile.size);
        }
        for (int64_t i = from; i < from + count; ++i) {
          e[i] /= ties_[i];
          e[size_ + i] /= static_cast<float>(s_.c);
        }
        correlate_planes(s_, tile, d, in, part);
        for (int64_t i = 0; i < 2 * taps; ++i) weights[i] += part[i];
      };
      back(flow_dot_, planes, e_dot_);
      back(flow_, planes_dot_, e_);
    });
  }

  void gate_back() {
    const CbamWeights& w = args_.weights;
    const float* const gate = row(args_.saved.gate, s_.c);
    float* const logits = row(args_.grad_logits, 2 * s_.c);
    for_lanes(s_.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
      const auto at = [&](const float* row) RACCGAN_INLINE { return lanes.load(row + c); };
      const Floats g = at(gate), open = g * (1.0f - g), d = at(sums_);
      lanes.store(logits + c, d * open);
      lanes.store(logits + s_.c + c, multiply_add((1.0f - 2.0f * g) * at(gate_dot_), d, at(sums_ + s_.c) * open));
    });
    const float* const before = row(args_.saved.hidden, 3 * s_.r);
    float* const hidden = row(args_.grad_hidden, 4 * s_.r);
    for (int i = 0; i < 2; ++i) {  // the gradient, then its derivative
      float* const here = hidden + 2 * i * s_.r;
      transposed_product(w.expand_weight, logits + i * s_.c, s_.c, s_.r, here);
      for (int64_t r = 0; r < s_.r; ++r) {
        const float g = here[r];
        here[r] = before[r] > 0 ? g : 0;
        here[s_.r + r] = before[s_.r + r] > 0 ? g : 0;
      }
    }
    transposed_product(w.reduce_weight, hidden + 2 * s_.r, s_.r, s_.c, row(args_.grad_average, s_.c));
    transposed_product(w.reduce_weight, hidden + 3 * s_.r, s_.r, s_.c, row(args_.grad_maximum, s_.c));
  }

  const CbamDoubleBackwardArgs& args_;
  const CbamShape& s_;
  const int64_t n_, size_;
  Scratch scratch_;
  // By channel. sums_: of pool(), v, v where x is the max, and where it is; of apply(), d gate and d gate'.
  float *const sums_ = scratch_.channels(3), *const tied_ = sums_ + 2 * s_.c;
  float* const chunk_ = scratch_.channels(3);
  float* const gate_dot_ = scratch_.channels();
  // By pixel.
  float* const ties_ = scratch_.pixels();
  float* const planes_dot_ = scratch_.pixels(2);
  float* const normal_dot_ = scratch_.pixels();
  float *const spatial_ = scratch_.pixels(), *const spatial_dot_ = scratch_.pixels();
  float *const flow_ = scratch_.pixels(), *const flow_dot_ = scratch_.pixels();
  float *const e_ = scratch_.pixels(2), *const e_dot_ = scratch_.pixels(2);  // e_max, e_mean
};
}}  // namespace raccgan
