// CBAM on a CPU, backward. From g = dL/dy; u = x gate, and spatial = sigmoid(normalised scores):
//
//     flow[n, p]  = spatial (1 - spatial) sum over c of g u            to the normalised scores
//     d s         = alpha flow + beta + gamma (s - mean)               through the norm, see NormBack
//     e_max, e_mean = correlations of d s with the two planes' weights;  e_max over the ties of the max, e_mean over C
//     d u         = g spatial + e_mean + e_max [u is the pixel's max]
//     d gate      = sum over p of x d u, through the MLP to d average and d max
//     d x         = gate d u + d average / P + d max / ties [x is the channel's max]
//
// The sum over p of x g spatial needs no e and is taken with the flow: x and g are read together twice, x once alone,
// and of these three sweeps the last two again while a sample is in a cache.
#include <math.h>
#include "planes.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
// Sums over pixels: of what flows to the normalised scores, and of its product with those.
struct NormSums {
  double flow, product;
};

// How the gradient of a score comes from what flows to it normalised: alpha * flow + beta + gamma * (score - mean).
struct NormGradient {
  float alpha, beta, gamma;
};

struct Pass : CbamBackwardArgs {
  const int64_t rows = shape.n * shape.c, all_pixels = shape.n * pixels(shape), taps = 2 * shape.k * shape.k;
  const bool channels = needs_channel_gate(gradients);
  const Memory<> flow{all_pixels};                // to the normalised scores
  const Memory<> ties{all_pixels};                // how many channels reach the pixel's max
  const Memory<> grad_planes{2 * all_pixels};     // [N, 2, P], see convolve_back
  const Memory<> sums{3 * rows * chunks(shape)};  // [N, chunks, 3, C]: d gate, in two parts, and pixels at the max
  const Memory<> grad_logits{rows};               // to the argument of the channel gate's sigmoid
  const Memory<> grad_hidden{2 * shape.n * shape.r};  // [N, 2, R], to the arguments of the hidden layers' ReLU
  const Memory<> grad_average{rows}, grad_maximum{rows};
  const Memory<> tied{rows};  // how many pixels reach the channel's max
  const Memory<> grad_spatial{gradients.spatial_weight ? shape.n * tiles(shape) * taps : 0};  // [N, tiles, 2, k, k]
  const Memory<NormSums> norm_sums{shape.n * tiles(shape)};
  const Memory<NormGradient> norm_gradients{shape.n};

  explicit Pass(const CbamBackwardArgs& args) : CbamBackwardArgs(args) {}
};

template <class T, bool kChannels>
void find_flow(const Pass& pass, const Samples& of_x, const Samples& of_grad_y, const Chunk& chunk) {
  const CbamShape& s = pass.shape;
  const auto *const x = chunk.of<T>(s, of_x), *const grad_y = chunk.of<T>(s, of_grad_y);
  const float* const gate = pass.saved.gate + chunk.sample * s.c;
  const float* const largest = pass.saved.planes + chunk.in_planes(s);
  float* const d_gate = pass.sums + chunk.task * 3 * s.c;
  float spatial[kMostPixels];
  find_gates(pass, chunk, spatial);
  for_lanes(chunk.count(), [&](auto pixel_lanes, int64_t block) RACCGAN_INLINE {
    Floats flows[kWidth] = {}, ties[kWidth] = {};
    for_pixels(0, least(kWidth, chunk.count() - block), [&](int64_t p, auto pixels) RACCGAN_INLINE {
      Floats flow[pixels.count] = {}, tied[pixels.count] = {};
      for_lanes(s.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
        const Floats channel = lanes.load(gate + c);
        Floats through{};
#pragma GCC unroll 4
        for (int i = 0; i < pixels.count; ++i) {
          const int64_t at = (block + p + i) * s.c + c;
          __builtin_prefetch(x + at + 2 * kAhead, 0, 2);  // into the second-level cache
          __builtin_prefetch(grad_y + at + 2 * kAhead, 0, 2);
          const Floats v = lanes.template load<T>(x + at), g = lanes.template load<T>(grad_y + at);
          const Floats u = v * channel;
          flow[i] = multiply_add(g, u, flow[i]);
          tied[i] += lanes.keep(reaches(u, all(largest[block + p + i])), Floats{});
          if (kChannels) through = multiply_add(g * v, all(spatial[block + p + i]), through);
        }
        if (kChannels) add_to(lanes, d_gate + c, block + p, through);
      });
#pragma GCC unroll 4
      for (int i = 0; i < pixels.count; ++i) flows[p + i] = flow[i], ties[p + i] = tied[i];
    });
    const Floats open = pixel_lanes.load(spatial + block);
    const int64_t to = chunk.in_plane(s) + block;
    pixel_lanes.store(pass.flow + to, sums_of(flows) * open * (1.0f - open));
    pixel_lanes.store(pass.ties + to, sums_of(ties));
  });
}

NormSums sum_flow(const Pass& pass, const Tile& tile) {
  const int64_t from = tile.in_plane(pass.shape);
  const float *const moments = moments_of(pass, tile.sample), *const scores = pass.saved.scores + from;
  Floats sum{}, product{};
  for_lanes(tile.count(pass.shape), [&](auto lanes, int64_t i) RACCGAN_INLINE {
    const Floats v = lanes.load(pass.flow + from + i);
    sum += v;
    product = multiply_add(v, lanes.load(scores + i) - moments[0], product);
  });
  const double deviation = __builtin_sqrtf(moments[1] + pass.weights.eps);
  return {sum_of_lanes(sum), sum_of_lanes(product) / deviation};
}

// The way back through the norm of the samples first <= n < last, which share moments. With r = 1 / deviation and
// means over all their pixels: d s = norm_weight r (flow - mean flow - s' mean (flow s')), s' = r (s - mean), and from
// the moments themselves grad_mean / M + 2 grad_var (s - mean) / M. Moments that were given leave the first term alone.
struct NormBack : NormSums {
  double over, alpha;

  NormBack(const Pass& pass, int64_t first, int64_t last) : NormSums{} {
    for (int64_t i = first * tiles(pass.shape); i < last * tiles(pass.shape); ++i) {
      flow += pass.norm_sums[i].flow;
      product += pass.norm_sums[i].product;
    }
    over = 1 / sqrt(static_cast<double>(moments_of(pass, first)[1]) + pass.weights.eps);
    alpha = *pass.weights.norm_weight * over;
  }
};

void join_norm(const Pass& pass, int64_t first, int64_t last) {
  const NormBack back(pass, first, last);
  double beta = 0, gamma = 0;
  if (pass.norm != CbamNorm::kFixed) {
    const double count = static_cast<double>((last - first) * pixels(pass.shape));
    beta = (pass.grad_mean == nullptr ? 0 : pass.grad_mean[first] / count) - back.alpha * back.flow / count;
    gamma = (pass.grad_var == nullptr ? 0 : 2 * pass.grad_var[first] / count) -
            back.alpha * back.over * back.product / count;
  }
  for (int64_t n = first; n < last; ++n) {
    pass.norm_gradients[n] = {static_cast<float>(back.alpha), static_cast<float>(beta), static_cast<float>(gamma)};
  }
}

// The gradient of a row of scores.
void score_gradient(const Pass& pass, int64_t n, int64_t row, float* to) {
  const CbamShape& s = pass.shape;
  const NormGradient norm = pass.norm_gradients[n];
  const float mean = moments_of(pass, n)[0];
  const int64_t from = (n * s.h + row) * s.w;
  for_lanes(s.w, [&](auto lanes, int64_t i) RACCGAN_INLINE {
    const Floats flow = lanes.load(pass.flow + from + i);
    const Floats score = lanes.load(pass.saved.scores + from + i);
    lanes.store(to + i, flow * norm.alpha + norm.beta + (score - mean) * norm.gamma);
  });
}

void from_scores(const Pass& pass, const Tile& tile) {
  const CbamShape& s = pass.shape;
  const int64_t plane = tile.sample * pixels(s);
  const Memory<> scratch(tile_floats(s));
  float *const flipped = scratch, *const d = scratch + pass.taps;
  fill(s, tile, d, [&](int64_t row, float* to) { score_gradient(pass, tile.sample, row, to); });
  if (pass.channels) {
    flip(pass.weights.spatial_weight, s.k, flipped);
    convolve_back(s, tile, d, flipped, pass.ties + plane, pass.grad_planes + 2 * plane);
  }
  if (pass.gradients.spatial_weight != nullptr) {
    float* const to = pass.grad_spatial + tile.task * pass.taps;
    correlate_planes(s, tile, d, pass.saved.planes + 2 * plane, d + tile.size, to);
  }
}

template <class T> void gather_back(const Pass& pass, const Samples& samples, const Chunk& chunk) {
  const CbamShape& s = pass.shape;
  const auto* const x = chunk.of<T>(s, samples);
  const float* const gate = pass.saved.gate + chunk.sample * s.c;
  const float* const maximum = pass.saved.maximum + chunk.sample * s.c;
  const float* const largest = pass.saved.planes + chunk.in_planes(s);
  const float *const e_max = pass.grad_planes + chunk.in_planes(s), *const e_mean = e_max + pixels(s);
  float* const d_gate = pass.sums + chunk.task * 3 * s.c + s.c;
  for_values(0, chunk.count(), s.c, [&](auto lanes, int64_t p, int64_t c, auto pixels) RACCGAN_INLINE {
    const Floats channel = lanes.load(gate + c);
    const Floats max = lanes.load(maximum + c);
    Floats through{}, tied{};
#pragma GCC unroll 4
    for (int i = 0; i < pixels.count; ++i) {
      const auto* const from = x + (p + i) * s.c + c;
      __builtin_prefetch(from + 2 * kAhead, 0, 2);
      const Floats v = lanes.template load<T>(from);
      const Words is_max = (Words)(v * channel == all(largest[p + i]));
      through = multiply_add(v, e_mean[p + i] + select(is_max, all(e_max[p + i]), Floats{}), through);
      tied += reaches(v, max);
    }
    add_to(lanes, d_gate + c, p, through);
    add_to(lanes, d_gate + s.c + c, p, tied);
  });
}

// From the sums over a sample's chunks back through the channel gate.
void gate_back(const Pass& pass, int64_t n) {
  const CbamShape& s = pass.shape;
  const float* const sums = pass.sums + n * chunks(s) * 3 * s.c;
  for_lanes(s.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
    Doubles d_gate{}, tied{};
    for (int64_t i = 0; i < chunks(s); ++i) {
      const float* const at = sums + i * 3 * s.c + c;
      d_gate += widened(lanes.load(at)) + widened(lanes.load(at + s.c));
      tied += widened(lanes.load(at + 2 * s.c));
    }
    const Floats gate = lanes.load(pass.saved.gate + n * s.c + c);
    lanes.store(pass.grad_logits + n * s.c + c, narrowed(d_gate) * gate * (1.0f - gate));
    lanes.store(pass.tied + n * s.c + c, narrowed(tied));
  });
  float* const hidden = pass.grad_hidden + n * 2 * s.r;
  hidden_back(pass, n, pass.grad_logits + n * s.c, hidden);
  pooled_back(pass, hidden, pass.grad_average + n * s.c, pass.grad_maximum + n * s.c);
}

template <class T>
void apply_back(const Pass& pass, const Samples& of_x, const Samples& of_grad_y, const Chunk& chunk) {
  const CbamShape& s = pass.shape;
  const float over = 1.0f / static_cast<float>(pixels(s));
  const auto *const x = chunk.of<T>(s, of_x), *const grad_y = chunk.of<T>(s, of_grad_y);
  auto* const grad_x = static_cast<typename T::Stored*>(pass.gradients.x) + chunk.in_tensor(s);
  const int64_t row = chunk.sample * s.c;
  const float* const largest = pass.saved.planes + chunk.in_planes(s);
  const float *const e_max = pass.grad_planes + chunk.in_planes(s), *const e_mean = e_max + pixels(s);
  float spatial[kMostPixels];
  find_gates(pass, chunk, spatial);
  for_values(0, chunk.count(), s.c, [&](auto lanes, int64_t p, int64_t c, auto pixels) RACCGAN_INLINE {
    const Floats channel = lanes.load(pass.saved.gate + row + c);
    const Floats max = lanes.load(pass.saved.maximum + row + c);
    const Floats from_average = lanes.load(pass.grad_average + row + c) * over;
    const Floats tied = lanes.keep(lanes.load(pass.tied + row + c), all(1.0f));
    const Floats from_max = lanes.load(pass.grad_maximum + row + c) / tied;
#pragma GCC unroll 4
    for (int i = 0; i < pixels.count; ++i) {
      const int64_t at = (p + i) * s.c + c;
      __builtin_prefetch(x + at + kAhead);
      __builtin_prefetch(grad_y + at + kAhead);
      __builtin_prefetch(grad_x + at + kAhead, 1);
      const Floats v = lanes.template load<T>(x + at), g = lanes.template load<T>(grad_y + at);
      const Words is_max = (Words)(v * channel == all(largest[p + i]));
      const Floats e = select(is_max, all(e_max[p + i]), Floats{}) + e_mean[p + i];
      const Floats d = multiply_add(g, all(spatial[p + i]), e);
      const Floats pooled = from_average + select((Words)(v == max), from_max, Floats{});
      lanes.template store<T>(grad_x + at, multiply_add(channel, d, pooled));
    }
  });
}

// A row of the MLP's weights, see for_rows.
void weights_back(const Pass& pass, int64_t row) {
  const CbamShape& s = pass.shape;
  if (row < s.r) {
    float* const to = pass.gradients.reduce_weight + row * s.c;
    outer_sum(pass.grad_hidden + row, 2 * s.r, pass.saved.average, s.c, s.n, s.c, false, to);
    outer_sum(pass.grad_hidden + s.r + row, 2 * s.r, pass.saved.maximum, s.c, s.n, s.c, true, to);
    pass.gradients.reduce_bias[row] = strided_sum(pass.grad_hidden + row, s.r, 2 * s.n);
  } else {
    const int64_t c = row - s.r;
    float* const to = pass.gradients.expand_weight + c * s.r;
    outer_sum(pass.grad_logits + c, s.c, pass.saved.hidden + 2 * s.r, 3 * s.r, s.n, s.r, false, to);
    pass.gradients.expand_bias[c] = 2 * strided_sum(pass.grad_logits + c, s.c, s.n);
  }
}

// The gradients that are sums over what the stages leave.
void finish(const Pass& pass) {
  const CbamShape& s = pass.shape;
  const CbamGradients& to = pass.gradients;
  if (needs_mlp(to)) for_rows(s, [&](int64_t row) { weights_back(pass, row); });
  if (to.spatial_weight != nullptr) add_up(pass.grad_spatial, s.n * tiles(s), pass.taps, to.spatial_weight);
  double weight = 0, bias = 0, mean = 0, var = 0;
  const int64_t together = pass.norm == CbamNorm::kBatch ? most(1, s.n) : 1;
  for (int64_t n = 0; n < s.n; n += together) {
    const NormBack back(pass, n, n + together);
    weight += back.product, bias += back.flow;
    mean -= back.alpha * back.flow, var -= back.alpha * back.over * back.product / 2;
  }
  const double values[] = {weight, bias, mean, var};
  float* const numbers[] = {to.norm_weight, to.norm_bias, to.mean, to.var};
  for (int i = 0; i < 4; ++i) {
    if (numbers[i] != nullptr) *numbers[i] = static_cast<float>(values[i]);
  }
}

template <class T> void backward(const CbamBackwardArgs& args) {
  const Pass pass(args);
  const CbamShape& s = pass.shape;
  const bool coupled = args.norm == CbamNorm::kBatch;
  const Image images[] = {{args.x, args.x_planar}, {args.grad_y, args.grad_y_planar}};
  const auto back = [&](const Samples* of, int64_t first, int64_t last) {
    if (pass.channels || pass.gradients.spatial_weight != nullptr) {
      for_tasks<Tile>(s, first, last, [&](const Tile& tile) { from_scores(pass, tile); });
    }
    if (!pass.channels) return;
    for_tasks<Chunk>(s, first, last, [&](const Chunk& chunk) { gather_back<T>(pass, of[0], chunk); });
    for_samples(s, first, last, [&](int64_t n) { gate_back(pass, n); });
    if (pass.gradients.x == nullptr) return;
    for_tasks<Chunk>(s, first, last, [&](const Chunk& chunk) { apply_back<T>(pass, of[0], of[1], chunk); });
  };
  for_groups<T>(s, images, [&](const Samples* of, int64_t first, int64_t last) {
    const auto flow = pass.channels ? find_flow<T, true> : find_flow<T, false>;
    for_tasks<Chunk>(s, first, last, [&](const Chunk& chunk) { flow(pass, of[0], of[1], chunk); });
    for_tasks<Tile>(s, first, last, [&](const Tile& tile) { pass.norm_sums[tile.task] = sum_flow(pass, tile); });
    if (coupled) return;
    for (int64_t n = first; n < last; ++n) join_norm(pass, n, n + 1);
    back(of, first, last);
  });
  if (coupled) {
    join_norm(pass, 0, s.n);
    for_groups<T>(s, images, back);
  }
  finish(pass);
}
}  // namespace

void cbam_backward(const CbamBackwardArgs& args) { RACCGAN_OF_DTYPE(args.shape.dtype, backward)(args); }
}  // namespace raccgan::RACCGAN_TARGET
