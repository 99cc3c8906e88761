// CBAM on a GPU, backward, in the notation of cpu/cbam/backward.cpp.
// Three sweeps over x and g, a group of samples at a time as in forward.cu.
#include "backward_spatial.h"

namespace raccgan::cuda {
namespace {
// What a thread needs of one sample's planes to get d u from g, u and a pixel.
struct Planes {
  const Backward& args;
  int64_t n, pixels = args.shape.h * args.shape.w;
  CbamSpatialGate spatial = spatial_gate(args, n);
  const float *scores = args.saved.scores + n * pixels, *largest = args.saved.planes + 2 * n * pixels;
  const float *e_max = args.d_planes + 2 * n * pixels, *e_mean = e_max + pixels;

  // d u of g and u, at a pixel.
  __device__ auto d_u_at(int64_t p) const {
    const float open = gated(spatial, scores[p]), top = largest[p], of_max = e_max[p], of_mean = e_mean[p];
    return [=](float g, float u) { return fmaf(g, open, of_mean + (u == top ? of_max : 0.0f)); };
  }
};

template <class T, int V> __global__ void __launch_bounds__(kThreads) sum_channels(Backward args, Tiling t) {
  const Columns<V> at{t};
  const Planes planes{args, at.group};
  float gate[V] = {}, maximum[V] = {}, d_gate[V] = {}, tied[V] = {};
  if (at.active) {
    load_floats(args.saved.gate + at.in_row(), gate);
    load_floats(args.saved.maximum + at.in_row(), maximum);
  }
#pragma unroll 1
  for (int64_t p = at.first, from = at.at(p); p < at.last; p += at.rows, from += at.step) {
    float v[V], g[V];
    load<T, V>(args.x, from, v);
    load<T, V>(args.grad_y, from, g);
    const auto d_u = planes.d_u_at(p);
    for (int i = 0; i < V; ++i) {
      d_gate[i] = fmaf(v[i], d_u(g[i], v[i] * gate[i]), d_gate[i]);
      tied[i] += v[i] == maximum[i] ? 1.0f : 0.0f;
    }
  }
  at.write(add_rows(at, d_gate), add_rows(at, tied), args.sums);
}

// A block has a sample.
__global__ void __launch_bounds__(kThreads) gate_back(Backward args, Range range) {
  const CbamShape& s = args.shape;
  const CbamWeights& w = args.weights;
  const int64_t n = range.first + blockIdx.x, tiles = ceiling(s.h * s.w, kTilePixels);
  for (int64_t c = threadIdx.x; c < s.c; c += kThreads) {
    double d_gate = 0.0, tied = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* const from = args.sums + (n * tiles + tile) * 2 * s.c + c;
      d_gate += from[0];
      tied += from[s.c];
    }
    const float gate = args.saved.gate[n * s.c + c];
    args.d_logits[n * s.c + c] = static_cast<float>(d_gate) * gate * (1.0f - gate);
    args.tied[n * s.c + c] = static_cast<float>(tied);
  }
  __syncthreads();
  const float* const logits = args.d_logits + n * s.c;
  const float* const hidden = args.saved.hidden + n * 3 * s.r;
  float* const grad_hidden = args.d_hidden + n * 2 * s.r;
  const int lane = threadIdx.x % kWarp;
  for (int64_t r = threadIdx.x / kWarp; r < s.r; r += kWarps) {
    float sum = 0.0f;
    for (int64_t c = lane; c < s.c; c += kWarp) sum = fmaf(w.expand_weight[c * s.r + r], logits[c], sum);
    sum = sum_over_group(sum, kWarp);
    if (lane < 2) grad_hidden[lane * s.r + r] = hidden[lane * s.r + r] > 0.0f ? sum : 0.0f;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < s.c; c += kThreads) {
    float average = 0.0f, maximum = 0.0f;
    for (int64_t r = 0; r < s.r; ++r) {
      average = fmaf(w.reduce_weight[r * s.c + c], grad_hidden[r], average);
      maximum = fmaf(w.reduce_weight[r * s.c + c], grad_hidden[s.r + r], maximum);
    }
    args.d_average[n * s.c + c] = average;
    args.d_max[n * s.c + c] = maximum;
  }
}

template <class T, int V> __global__ void __launch_bounds__(kThreads) apply_back(Backward args, Tiling t) {
  const Columns<V> at{t};
  if (!at.active) return;
  const Planes planes{args, at.group};
  float gate[V], maximum[V], from_average[V], from_max[V], tied[V];
  load_floats(args.saved.gate + at.in_row(), gate);
  load_floats(args.saved.maximum + at.in_row(), maximum);
  load_floats(args.d_average + at.in_row(), from_average);
  load_floats(args.d_max + at.in_row(), from_max);
  load_floats(args.tied + at.in_row(), tied);
  for (int i = 0; i < V; ++i) {
    from_average[i] /= static_cast<float>(t.pixels);
    from_max[i] /= tied[i];
  }
#pragma unroll 1
  for (int64_t p = at.first, i = at.at(p); p < at.last; p += at.rows, i += at.step) {
    float v[V], g[V];
    load<T, V>(args.x, i, v);
    load<T, V>(args.grad_y, i, g);
    const auto d_u = planes.d_u_at(p);
    for (int j = 0; j < V; ++j) {
      const float pooled = from_average[j] + (v[j] == maximum[j] ? from_max[j] : 0.0f);
      v[j] = fmaf(gate[j], d_u(g[j], v[j] * gate[j]), pooled);
    }
    store<T, V>(args.gradients.x, i, v);
  }
}

// The gradients of the MLP's weights and biases, a number a thread: R x C, then C x R, then R, then C.
__global__ void __launch_bounds__(kThreads) finish_mlp(Backward args) {
  const CbamShape& s = args.shape;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t matrix = s.r * s.c;
  double sum = 0.0;
  float* to = nullptr;
  if (i < matrix) {
    const int64_t r = i / s.c, c = i % s.c;
    to = args.gradients.reduce_weight;
    for (int64_t n = 0; n < s.n && to; ++n) {
      const float* const hidden = args.d_hidden + n * 2 * s.r + r;
      sum += hidden[0] * args.saved.average[n * s.c + c] + hidden[s.r] * args.saved.maximum[n * s.c + c];
    }
  } else if ((i -= matrix) < matrix) {
    const int64_t c = i / s.r, r = i % s.r;
    to = args.gradients.expand_weight;
    for (int64_t n = 0; n < s.n && to; ++n) {
      sum += args.d_logits[n * s.c + c] * args.saved.hidden[(3 * n + 2) * s.r + r];
    }
  } else if ((i -= matrix) < s.r) {
    to = args.gradients.reduce_bias;
    for (int64_t n = 0; n < 2 * s.n && to; ++n) sum += args.d_hidden[n * s.r + i];
  } else if ((i -= s.r) < s.c) {
    to = args.gradients.expand_bias;
    for (int64_t n = 0; n < s.n && to; ++n) sum += 2.0f * args.d_logits[n * s.c + i];
  }
  if (to) to[i] = static_cast<float>(sum);
}

template <class T, int V> void run(Queue& queue, const Backward& args) {
  const CbamShape& s = args.shape;
  const int group = threads_a_pixel(s.c, V);
  const CbamGradients& to = args.gradients;
  const bool channels = needs_channel_gate(to), coupled = args.norm == CbamNorm::kBatch;
  const auto through_the_norm = [&](const Range& range) {
    const int64_t blocks = blocks_of_pixels(s, range, 1);
    if (channels || to.spatial_weight) queue(find_d_scores, blocks, kThreads, args, range);
    if (to.spatial_weight) {
      queue(correlate_planes, range.count * 2 * s.k * ceiling(s.k, kTaps), kThreads, args, range);
    }
    if (!channels) return;
    const Tiling t = tiling_of(s, range, V);
    for_plane_size(s.k, [&](auto size) { queue(convolve_back<size>, blocks, kThreads, args, range); });
    queue(sum_channels<T, V>, t.blocks(), kThreads, args, t);
    queue(gate_back, range.count, kThreads, args, range);
    if (to.x) queue(apply_back<T, V>, t.blocks(), kThreads, args, t);
  };
  for_groups(s, 2, [&](const Range& range) {
    queue(find_flow<T, V>, blocks_of_pixels(s, range, group), kThreads, args, range, group);
    queue(sum_norm, range.count, kThreads, args, range);
    if (coupled) return;
    queue(join_norm, range.count, kThreads, args, range, 1);
    through_the_norm(range);
  });
  if (coupled) {
    queue(join_norm, s.n == 0 ? 0 : 1, kThreads, args, Range{0, 1}, s.n);
    for_groups(s, 2, through_the_norm);
  }
  if (to.norm_weight || to.norm_bias || to.mean || to.var) queue(finish_norm, 1, kThreads, args);
  if (to.spatial_weight) queue(finish_spatial, ceiling(2 * s.k * s.k, kThreads), kThreads, args);
  if (needs_mlp(to)) queue(finish_mlp, ceiling(2 * s.r * s.c + s.r + s.c, kThreads), kThreads, args);
}
}  // namespace

int64_t scratch_floats(const CbamBackwardArgs& args) { return Backward(args, nullptr).scratch.floats; }

const char* queue_pass(const CbamBackwardArgs& args, float* scratch, int device, void* stream) {
  Queue queue(device, stream);
  queue.take(too_large(args.shape));
  const Backward all(args, scratch);
  for_vectors(args.shape.dtype, args.shape.c, [&](auto element, auto vector) {
    run<decltype(element), vector>(queue, all);
  }, args.x, args.grad_y, args.gradients.x, args.saved.gate);
  return queue.error;
}
}  // namespace raccgan::cuda
