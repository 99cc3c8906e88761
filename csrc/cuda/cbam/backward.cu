// CBAM on a GPU, backward, in the notation of cpu/cbam/backward.cpp.
// Run on the PTX machine of tests/ptx, but not yet on a GPU: no speed is claimed. Three sweeps over x and g, a group of
// samples at a time as in forward.cu.
#include "backward_spatial.h"

namespace raccgan::cuda {
namespace {
// What a thread needs of one sample's planes to get d u from g, u and a pixel.
struct Planes {
  CbamSpatialGate spatial;
  const float *scores, *largest, *e_max, *e_mean;

  __device__ Planes(const Arguments& args, int64_t n) : spatial(spatial_gate(args.pass, n)) {
    const int64_t pixels = args.pass.shape.h * args.pass.shape.w;
    scores = args.pass.saved.scores + n * pixels;
    largest = args.pass.saved.planes + 2 * n * pixels;
    e_max = args.work.planes + 2 * n * pixels;
    e_mean = e_max + pixels;
  }
};

struct AtPixel {
  float open, largest, e_max, e_mean;

  __device__ AtPixel(const Planes& planes, int64_t p)
      : open(gated(planes.spatial, planes.scores[p])), largest(planes.largest[p]), e_max(planes.e_max[p]),
        e_mean(planes.e_mean[p]) {}

  __device__ float d_u(float g, float u) const { return fmaf(g, open, e_mean + (u == largest ? e_max : 0.0f)); }
};

template <class T, int V> __global__ void __launch_bounds__(kThreads) sum_channels(Arguments args, Tiling t) {
  const Columns<V> at(t);
  const CbamBackwardArgs& pass = args.pass;
  const Planes planes(args, at.group);
  float gate[V] = {}, maximum[V] = {}, d_gate[V] = {}, tied[V] = {};
  if (at.active) {
    load_floats(pass.saved.gate + at.in_row(t), gate);
    load_floats(pass.saved.maximum + at.in_row(t), maximum);
  }
#pragma unroll 1
  for (int64_t p = at.first, from = at.at(t, p); p < at.last; p += at.rows, from += at.step) {
    float v[V], g[V];
    load<T, V>(static_cast<const typename T::Stored*>(pass.x) + from, v);
    load<T, V>(static_cast<const typename T::Stored*>(pass.grad_y) + from, g);
    const AtPixel pixel(planes, p);
    for (int i = 0; i < V; ++i) {
      d_gate[i] = fmaf(v[i], pixel.d_u(g[i], v[i] * gate[i]), d_gate[i]);
      tied[i] += v[i] == maximum[i] ? 1.0f : 0.0f;
    }
  }
  const float sum = add_rows(at, d_gate), pixels_tied = add_rows(at, tied);
  at.write(t, sum, pixels_tied, args.work.sums);
}

// A block has a sample.
__global__ void __launch_bounds__(kThreads) gate_back(Arguments args, Range range) {
  const CbamShape& s = args.pass.shape;
  const CbamWeights& w = args.pass.weights;
  const int64_t n = range.first + blockIdx.x, tiles = ceiling(s.h * s.w, kTilePixels);
  for (int64_t c = threadIdx.x; c < s.c; c += kThreads) {
    double d_gate = 0.0, tied = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* const from = args.work.sums + (n * tiles + tile) * 2 * s.c + c;
      d_gate += from[0];
      tied += from[s.c];
    }
    const float gate = args.pass.saved.gate[n * s.c + c];
    args.work.logits[n * s.c + c] = static_cast<float>(d_gate) * gate * (1.0f - gate);
    args.work.tied[n * s.c + c] = static_cast<float>(tied);
  }
  __syncthreads();
  const float* const logits = args.work.logits + n * s.c;
  const float* const hidden = args.pass.saved.hidden + n * 3 * s.r;
  float* const grad_hidden = args.work.hidden + n * 2 * s.r;
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
    args.work.average[n * s.c + c] = average;
    args.work.maximum[n * s.c + c] = maximum;
  }
}

template <class T, int V> __global__ void __launch_bounds__(kThreads) apply_back(Arguments args, Tiling t) {
  const Columns<V> at(t);
  if (!at.active) return;
  const CbamBackwardArgs& pass = args.pass;
  const Planes planes(args, at.group);
  float gate[V], maximum[V], from_average[V], from_max[V], tied[V];
  load_floats(pass.saved.gate + at.in_row(t), gate);
  load_floats(pass.saved.maximum + at.in_row(t), maximum);
  load_floats(args.work.average + at.in_row(t), from_average);
  load_floats(args.work.maximum + at.in_row(t), from_max);
  load_floats(args.work.tied + at.in_row(t), tied);
  for (int i = 0; i < V; ++i) {
    from_average[i] /= static_cast<float>(t.pixels);
    from_max[i] /= tied[i];
  }
#pragma unroll 1
  for (int64_t p = at.first, i = at.at(t, p); p < at.last; p += at.rows, i += at.step) {
    float v[V], g[V];
    load<T, V>(static_cast<const typename T::Stored*>(pass.x) + i, v);
    load<T, V>(static_cast<const typename T::Stored*>(pass.grad_y) + i, g);
    const AtPixel pixel(planes, p);
    for (int j = 0; j < V; ++j) {
      const float pooled = from_average[j] + (v[j] == maximum[j] ? from_max[j] : 0.0f);
      v[j] = fmaf(gate[j], pixel.d_u(g[j], v[j] * gate[j]), pooled);
    }
    store<T, V>(static_cast<typename T::Stored*>(pass.gradients.x) + i, v);
  }
}

// The gradients of the MLP's weights and biases, a number a thread: R x C, then C x R, then R, then C.
__global__ void __launch_bounds__(kThreads) finish_mlp(Arguments args) {
  const CbamBackwardArgs& pass = args.pass;
  const CbamShape& s = pass.shape;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t matrix = s.r * s.c;
  double sum = 0.0;
  float* to = nullptr;
  if (i < matrix) {
    const int64_t r = i / s.c, c = i % s.c;
    to = pass.gradients.reduce_weight;
    for (int64_t n = 0; n < s.n && to; ++n) {
      const float* const hidden = args.work.hidden + n * 2 * s.r + r;
      sum += hidden[0] * pass.saved.average[n * s.c + c] + hidden[s.r] * pass.saved.maximum[n * s.c + c];
    }
  } else if ((i -= matrix) < matrix) {
    const int64_t c = i / s.r, r = i % s.r;
    to = pass.gradients.expand_weight;
    for (int64_t n = 0; n < s.n && to; ++n) {
      sum += args.work.logits[n * s.c + c] * pass.saved.hidden[(3 * n + 2) * s.r + r];
    }
  } else if ((i -= matrix) < s.r) {
    to = pass.gradients.reduce_bias;
    for (int64_t n = 0; n < 2 * s.n && to; ++n) sum += args.work.hidden[n * s.r + i];
  } else if ((i -= s.r) < s.c) {
    to = pass.gradients.expand_bias;
    for (int64_t n = 0; n < s.n && to; ++n) sum += 2.0f * args.work.logits[n * s.c + i];
  }
  if (to) to[i] = static_cast<float>(sum);
}

template <class T, int V> void run(Queue& queue, const Arguments& args) {
  const CbamBackwardArgs& pass = args.pass;
  const CbamShape& s = pass.shape;
  const int group = threads_a_pixel(s.c, V);
  const int64_t taps = 2 * s.k * s.k;
  const CbamGradients& to = pass.gradients;
  const bool channels = needs_channel_gate(to), coupled = pass.norm == CbamNorm::kBatch;
  const auto through_the_norm = [&](const Range& range) {
    const int64_t blocks = blocks_of_pixels(s, range, 1);
    if (channels || to.spatial_weight) queue(find_d_scores, blocks, kThreads, args, range);
    if (to.spatial_weight) {
      queue(correlate_planes, range.count * 2 * s.k * ceiling(s.k, kTaps), kThreads, args, range);
    }
    if (!channels) return;
    const Tiling t = tiling_of(s, range, V);
    for_plane_size(s.k, [&](auto size) { queue(convolve_back<decltype(size)::value>, blocks, kThreads, args, range); });
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
  if (to.spatial_weight) queue(finish_spatial, ceiling(taps, kThreads), kThreads, args);
  if (needs_mlp(to)) queue(finish_mlp, ceiling(2 * s.r * s.c + s.r + s.c, kThreads), kThreads, args);
}
}  // namespace

int64_t cbam_backward_floats(const CbamBackwardArgs& args) { return Work(args.shape, nullptr).floats; }

const char* cbam_backward(const CbamBackwardArgs& args, float* scratch, int device, void* stream) {
  Queue queue(device, stream);
  queue.take(too_large(args.shape));
  const Arguments all{args, Work(args.shape, scratch)};
  for_vectors(args.shape.dtype, args.shape.c, [&](auto element, auto vector) {
    run<decltype(element), decltype(vector)::width>(queue, all);
  }, args.x, args.grad_y, args.gradients.x, args.saved.gate);
  return queue.error();
}
}  // namespace raccgan::cuda
