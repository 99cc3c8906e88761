// CBAM on a CPU, backward. From g = dL/dy; u = x gate, and spatial = sigmoid(normalised scores):
//
//     flow[n, p]  = spatial (1 - spatial) sum over c of g u            to the normalised scores
//     d s         = alpha flow + beta + gamma (s - mean)               through the norm, see bindings/cbam/backward.cpp
//     e_max, e_mean = correlations of d s with the two planes' weights;  e_max over the ties of the max, e_mean over C
//     d u         = g spatial + e_mean + e_max [u is the pixel's max]
//     d gate      = sum over p of x d u, through the MLP to d average and d max
//     d x         = gate d u + d average / P + d max / ties [x is the channel's max]
//
// The sum over p of x g spatial needs no e and is taken with the flow: x and g are read together twice, x once alone,
// and of these three sweeps the last two again while a sample is in a cache.
#include "planes.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
template <class T, bool kChannels> void flow_as(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(s, task);
    const auto *const x = chunk.of<T>(s, args.x), *const grad_y = chunk.of<T>(s, args.grad_y);
    const float* const gate = args.saved.gate + chunk.sample * s.c;
    const float* const largest = args.saved.planes + chunk.in_planes(s);
    float* const d_gate = args.sums + task * 3 * s.c;
    float spatial[kCbamChunk];
    find_gates(spatial_gate(args, chunk.sample), args.saved.scores + chunk.in_plane(s), chunk.count(), spatial);
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
      pixel_lanes.store(args.flow + to, sums_of(flows) * open * (1.0f - open));
      pixel_lanes.store(args.ties + to, sums_of(ties));
    });
  }
}

// The gradient of a row of scores; see CbamNormGradient.
void score_gradient(const CbamBackwardArgs& args, int64_t n, int64_t row, float* to) {
  const CbamShape& s = args.shape;
  const CbamNormGradient& norm = args.norm_gradient[n];
  const int64_t from = (n * s.h + row) * s.w;
  for_lanes(s.w, [&](auto lanes, int64_t i) RACCGAN_INLINE {
    const Floats flow = lanes.load(args.flow + from + i);
    const Floats score = lanes.load(args.saved.scores + from + i);
    lanes.store(to + i, flow * norm.alpha + norm.beta + (score - norm.mean) * norm.gamma);
  });
}

template <class T> void gather_back_as(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  const int64_t size = s.h * s.w;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(s, task);
    const auto* const x = chunk.of<T>(s, args.x);
    const float* const gate = args.saved.gate + chunk.sample * s.c;
    const float* const maximum = args.saved.maximum + chunk.sample * s.c;
    const float* const largest = args.saved.planes + chunk.in_planes(s);
    const float *const e_max = args.grad_planes + chunk.in_planes(s), *const e_mean = e_max + size;
    float* const d_gate = args.sums + task * 3 * s.c + s.c;
    for_pixels(0, chunk.count(), [&](int64_t p, auto pixels) RACCGAN_INLINE {
      for_lanes(s.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
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
    });
  }
}

// The sums over a sample's chunks: what flows to the argument of the channel gate's sigmoid, and the channels' ties.
void add_chunks(const CbamBackwardArgs& args, int64_t n) {
  const CbamShape& s = args.shape;
  const float* const sums = args.sums + n * chunks(s) * 3 * s.c;
  for_lanes(s.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
    Doubles d_gate{}, tied{};
    for (int64_t i = 0; i < chunks(s); ++i) {
      const float* const at = sums + i * 3 * s.c + c;
      d_gate += widened(lanes.load(at)) + widened(lanes.load(at + s.c));
      tied += widened(lanes.load(at + 2 * s.c));
    }
    const Floats gate = lanes.load(args.saved.gate + n * s.c + c);
    lanes.store(args.grad_logits + n * s.c + c, narrowed(d_gate) * gate * (1.0f - gate));
    lanes.store(args.tied + n * s.c + c, narrowed(tied));
  });
}

template <class T> void apply_back_as(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  const int64_t size = s.h * s.w;
  const float over = 1.0f / static_cast<float>(size);
  for (int64_t task = begin; task < end; ++task) {
    const Chunk chunk(s, task);
    const auto *const x = chunk.of<T>(s, args.x), *const grad_y = chunk.of<T>(s, args.grad_y);
    auto* const grad_x = static_cast<typename T::Stored*>(args.gradients.x) + chunk.in_tensor(s);
    const int64_t row = chunk.sample * s.c;
    const float* const largest = args.saved.planes + chunk.in_planes(s);
    const float *const e_max = args.grad_planes + chunk.in_planes(s), *const e_mean = e_max + size;
    float spatial[kCbamChunk];
    find_gates(spatial_gate(args, chunk.sample), args.saved.scores + chunk.in_plane(s), chunk.count(), spatial);
    for_pixels(0, chunk.count(), [&](int64_t p, auto pixels) RACCGAN_INLINE {
      for_lanes(s.c, [&](auto lanes, int64_t c) RACCGAN_INLINE {
        const Floats channel = lanes.load(args.saved.gate + row + c);
        const Floats max = lanes.load(args.saved.maximum + row + c);
        const Floats from_average = lanes.load(args.grad_average + row + c) * over;
        const Floats tied = lanes.keep(lanes.load(args.tied + row + c), all(1.0f));
        const Floats from_max = lanes.load(args.grad_maximum + row + c) / tied;
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
    });
  }
}
}  // namespace

void cbam_flow(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  const bool channels = needs_channel_gate(args.gradients);
  if (args.shape.dtype == Dtype::kFloat32) {
    (channels ? flow_as<Float32, true> : flow_as<Float32, false>)(args, begin, end);
  } else {
    (channels ? flow_as<BFloat16, true> : flow_as<BFloat16, false>)(args, begin, end);
  }
}

void cbam_norm_sums(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile(s, task);
    const float* const moments = moments_of(args, tile.sample);
    const float* const flow = args.flow + tile.in_plane(s);
    const float* const scores = args.saved.scores + tile.in_plane(s);
    Floats sum{}, product{};
    for_lanes((tile.last - tile.first) * s.w, [&](auto lanes, int64_t i) RACCGAN_INLINE {
      const Floats v = lanes.load(flow + i);
      sum += v;
      product = multiply_add(v, lanes.load(scores + i) - moments[0], product);
    });
    const double deviation = __builtin_sqrtf(moments[1] + args.weights.eps);
    args.norm_sums[task] = {sum_of_lanes(sum), sum_of_lanes(product) / deviation};
  }
}

void cbam_convolve_back(const CbamBackwardArgs& args, float* scratch, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  const int64_t size = s.h * s.w, taps = s.k * s.k;
  float* const flipped = scratch;
  flip(args.weights.spatial_weight, s.k, flipped);
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile(s, task);
    float* const d = scratch + 2 * taps;
    fill(s, tile, d, [&](int64_t row, float* to) { score_gradient(args, tile.sample, row, to); });
    if (needs_channel_gate(args.gradients)) {
      float *const e_max = args.grad_planes + tile.sample * 2 * size + tile.first * s.w, *const e_mean = e_max + size;
      convolve(s, tile, 1, d, flipped, e_max);
      convolve(s, tile, 1, d, flipped + taps, e_mean);
      const float* const ties = args.ties + tile.in_plane(s);
      for (int64_t i = 0; i < (tile.last - tile.first) * s.w; ++i) {
        e_max[i] /= ties[i], e_mean[i] /= static_cast<float>(s.c);
      }
    }
    if (args.grad_spatial != nullptr) {
      float* const planes = d + tile.size;
      for (int plane = 0; plane < 2; ++plane) {
        copy_plane(s, tile, args.saved.planes + (tile.sample * 2 + plane) * size, planes + plane * tile.size);
      }
      correlate_planes(s, tile, d, planes, args.grad_spatial + task * 2 * taps);
    }
  }
}

void cbam_gather_back(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  RACCGAN_OF_DTYPE(args.shape.dtype, gather_back_as)(args, begin, end);
}

void cbam_gate_back(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  const CbamWeights& w = args.weights;
  for (int64_t n = begin; n < end; ++n) {
    add_chunks(args, n);
    const float* const hidden = args.saved.hidden + n * 3 * s.r;
    float* const grad_hidden = args.grad_hidden + n * 2 * s.r;
    transposed_product(w.expand_weight, args.grad_logits + n * s.c, s.c, s.r, grad_hidden);
    for (int64_t r = 0; r < s.r; ++r) {
      const float g = grad_hidden[r];
      grad_hidden[r] = hidden[r] > 0 ? g : 0;
      grad_hidden[s.r + r] = hidden[s.r + r] > 0 ? g : 0;
    }
    transposed_product(w.reduce_weight, grad_hidden, s.r, s.c, args.grad_average + n * s.c);
    transposed_product(w.reduce_weight, grad_hidden + s.r, s.r, s.c, args.grad_maximum + n * s.c);
  }
}

void cbam_apply_back(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  RACCGAN_OF_DTYPE(args.shape.dtype, apply_back_as)(args, begin, end);
}

void cbam_weights_back(const CbamBackwardArgs& args, int64_t begin, int64_t end) {
  const CbamShape& s = args.shape;
  for (int64_t row = begin; row < end; ++row) {
    if (row < s.r) {
      float* const to = args.gradients.reduce_weight + row * s.c;
      outer_sum(args.grad_hidden + row, 2 * s.r, args.saved.average, s.c, s.n, s.c, false, to);
      outer_sum(args.grad_hidden + s.r + row, 2 * s.r, args.saved.maximum, s.c, s.n, s.c, true, to);
      args.gradients.reduce_bias[row] = strided_sum(args.grad_hidden + row, s.r, 2 * s.n);
    } else {
      const int64_t c = row - s.r;
      float* const to = args.gradients.expand_weight + c * s.r;
      outer_sum(args.grad_logits + c, s.c, args.saved.hidden + 2 * s.r, 3 * s.r, s.n, s.r, false, to);
      args.gradients.expand_bias[c] = 2 * strided_sum(args.grad_logits + c, s.c, s.n);
    }
  }
}
}  // namespace raccgan::RACCGAN_TARGET
