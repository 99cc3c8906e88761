// CBAM on a GPU, backward. From g = dL/dy; u = x gate, and spatial = sigmoid(normalised scores):
//
//     flow[n, p]  = spatial (1 - spatial) sum over c of g u            to the normalised scores
//     d s         = alpha flow + beta + gamma (s - mean)               through the norm and the moments
//     e_max, e_mean = correlations of d s with the two planes' weights;  e_max over the ties of the max, e_mean over C
//     d u         = g spatial + e_mean + e_max [u is the pixel's max]
//     d gate      = sum over p of x d u, through the MLP to d average and d max
//     d x         = gate d u + d average / P + d max / ties [x is the channel's max]
//
// Compiled for the architectures in setup.py and run in emulation (emulation.h), but not yet run on a GPU: no speed is
// claimed for it. Three sweeps over x and g, a group of samples at a time as in cbam.cu.
#include "cbam_pixels.h"

namespace raccgan {
namespace cuda {
namespace {

constexpr int64_t kPiece = 256;  // pixels

// The scratch memory of a pass.
struct Work {
  double* norm_sums;   // [N, 2], over a sample: of what flows to the normalised scores, and of that times them
  float* norm_gradient;  // [N, 3]: alpha, beta, gamma
  float* flow;         // [N, P]
  float* ties;         // [N, P], how many channels reach the pixel's max
  float* d_scores;     // [N, P]
  float* planes;       // [N, 2, P], e_max and e_mean
  float* sums;         // [N, pieces, 2, C]: d gate, and how many pixels reach the channel's max
  float* tied;         // [N, C], the latter over all pieces
  float *average, *maximum;  // [N, C], d average and d max
  float* logits;       // [N, C], to the argument of the channel gate's sigmoid
  float* hidden;       // [N, 2, R], to the arguments of the hidden layers' ReLU
  float* spatial;      // [N, 2, k, k]
  int64_t floats = 0;

  Work(const CbamShape& s, float* memory) {
    const auto next = [&](int64_t count) {
      const int64_t at = floats;
      floats += ceiling(count, 4) * 4;  // each on a 16-byte boundary
      return memory ? memory + at : nullptr;
    };
    const int64_t np = s.n * s.pixels(), nc = s.n * s.c;
    norm_sums = reinterpret_cast<double*>(next(4 * s.n));
    norm_gradient = next(3 * s.n);
    flow = next(np);
    ties = next(np);
    d_scores = next(np);
    planes = next(2 * np);
    sums = next(2 * nc * ceiling(s.pixels(), kPiece));
    tied = next(nc);
    average = next(nc);
    maximum = next(nc);
    logits = next(nc);
    hidden = next(2 * s.n * s.r);
    spatial = next(2 * s.n * s.k * s.k);
  }
};

struct Arguments {
  CbamBackwardArgs pass;
  Work work;
  bool shared;  // whether all samples have the same moments
};

// ---- through the spatial gate ------------------------------------------------------------------------------------

template <class T, int V>
__global__ void __launch_bounds__(kThreads) find_flow(Arguments args, Range range, int group) {
  const CbamBackwardArgs& pass = args.pass;
  const CbamShape& s = pass.shape;
  const SharedPixel at(s, range, group);
  const auto* const x = static_cast<const typename T::Stored*>(pass.x) + at.at * s.c;
  const auto* const g_y = static_cast<const typename T::Stored*>(pass.g_y) + at.at * s.c;
  const float* const gate = pass.saved.gate + at.n * s.c;
  const float largest = pass.saved.planes[at.in_plane(s, 0)];
  float flow = 0.0f, ties = 0.0f;
#pragma unroll 1
  for (int64_t c = at.member * V; c < s.c; c += group * V) {
    float v[V], g[V], channel[V];
    load<T, V>(x + c, v);
    load<T, V>(g_y + c, g);
    load_floats(gate + c, channel);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float u = v[i] * channel[i];
      flow = fmaf(g[i], u, flow);
      ties += u == largest ? 1.0f : 0.0f;
    }
  }
  flow = sum_over_group(flow, group);
  ties = sum_over_group(ties, group);
  if (at.member != 0 || !at.there) return;
  const SpatialGate spatial(pass.weights, moments_of(pass.saved, args.shared, at.n));
  const float open = spatial(pass.saved.scores[at.at]);
  args.work.flow[at.at] = flow * open * (1.0f - open);
  args.work.ties[at.at] = ties;
}

// A block has a sample.
__global__ void __launch_bounds__(kThreads) sum_norm(Arguments args, Range range) {
  __shared__ double shared[kThreads];
  const CbamShape& s = args.pass.shape;
  const int64_t n = range.first + blockIdx.x, pixels = s.h * s.w;
  const float* const moments = moments_of(args.pass.saved, args.shared, n);
  double flow = 0.0, product = 0.0;
  for (int64_t p = n * pixels + threadIdx.x; p < (n + 1) * pixels; p += kThreads) {
    flow += args.work.flow[p];
    product += static_cast<double>(args.work.flow[p]) * (args.pass.saved.scores[p] - moments[0]);
  }
  flow = add_block(flow, shared);
  product = add_block(product, shared);
  if (threadIdx.x != 0) return;
  args.work.norm_sums[2 * n] = flow;
  args.work.norm_sums[2 * n + 1] = product / sqrt(static_cast<double>(moments[1]) + args.pass.weights.eps);
}

// The gradient of the norm's argument, for the samples of a block that share moments. With r = 1 / deviation and means
// over all their pixels: d s = norm_weight r (flow - mean flow - s' mean (flow s')), s' = r (s - mean), and from the
// moments themselves g_mean / M + 2 g_var (s - mean) / M. Moments that were given leave the first term alone.
__global__ void __launch_bounds__(kThreads) join_norm(Arguments args, Range range, int64_t samples) {
  __shared__ double shared[kThreads];
  const CbamBackwardArgs& pass = args.pass;
  const int64_t first = range.first + blockIdx.x;
  double flow = 0.0, product = 0.0;
  for (int64_t n = first + threadIdx.x; n < first + samples; n += kThreads) {
    flow += args.work.norm_sums[2 * n];
    product += args.work.norm_sums[2 * n + 1];
  }
  flow = add_block(flow, shared);
  product = add_block(product, shared);
  const float* const moments = moments_of(pass.saved, args.shared, first);
  const double over = 1.0 / sqrt(static_cast<double>(moments[1]) + pass.weights.eps);
  const double alpha = *pass.weights.norm_weight * over;
  double beta = 0.0, gamma = 0.0;
  if (!pass.given.mean) {
    const double count = static_cast<double>(samples * pass.shape.h * pass.shape.w);
    beta = (pass.g_mean ? pass.g_mean[first] / count : 0.0) - alpha * flow / count;
    gamma = (pass.g_var ? 2.0 * pass.g_var[first] / count : 0.0) - alpha * over * product / count;
  }
  for (int64_t n = first + threadIdx.x; n < first + samples; n += kThreads) {
    args.work.norm_gradient[3 * n] = static_cast<float>(alpha);
    args.work.norm_gradient[3 * n + 1] = static_cast<float>(beta);
    args.work.norm_gradient[3 * n + 2] = static_cast<float>(gamma);
  }
}

// The gradients of norm_weight, norm_bias, mean and var: one block.
__global__ void __launch_bounds__(kThreads) finish_norm(Arguments args) {
  __shared__ double shared[kThreads];
  const CbamBackwardArgs& pass = args.pass;
  double sums[4] = {};
  for (int64_t n = threadIdx.x; n < pass.shape.n; n += kThreads) {
    const float* const moments = moments_of(pass.saved, args.shared, n);
    const double over = 1.0 / sqrt(static_cast<double>(moments[1]) + pass.weights.eps);
    const double alpha = *pass.weights.norm_weight * over;
    const double flow = args.work.norm_sums[2 * n], product = args.work.norm_sums[2 * n + 1];
    sums[0] += product;
    sums[1] += flow;
    sums[2] -= alpha * flow;
    sums[3] -= alpha * over * product / 2.0;
  }
  float* const to[4] = {pass.g_norm_weight, pass.g_norm_bias, pass.g_given_mean, pass.g_given_var};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const double sum = add_block(sums[i], shared);
    if (threadIdx.x == 0 && to[i]) *to[i] = static_cast<float>(sum);
  }
}

__global__ void __launch_bounds__(kThreads) find_d_scores(Arguments args, Range range) {
  const CbamShape& s = args.pass.shape;
  const SharedPixel at(s, range, 1);
  if (!at.there) return;
  const float* const by = args.work.norm_gradient + 3 * at.n;
  const float away = args.pass.saved.scores[at.at] - moments_of(args.pass.saved, args.shared, at.n)[0];
  args.work.d_scores[at.at] = fmaf(args.work.flow[at.at], by[0], fmaf(away, by[2], by[1]));
}

// e_max and e_mean.
template <int kSize>
__global__ void __launch_bounds__(kThreads) convolve_back(Arguments args, Range range) {
  const CbamShape& s = args.pass.shape;
  const float* const weights = plane_weights<kSize>(args.pass.weights.spatial_weight);
  const SharedPixel at(s, range, 1);
  if (!at.there) return;
  const float* const d = args.work.d_scores + at.n * s.h * s.w;
  const float over[2] = {args.work.ties[at.at], static_cast<float>(s.c)};
  for (int plane = 0; plane < 2; ++plane) {
    const float e = convolve_at<kSize, true>(s, d, weights + plane * s.k * s.k, at.pixel);
    args.work.planes[at.in_plane(s, plane)] = e / over[plane];
  }
}

constexpr int kTaps = 8;  // of a row of the spatial gate's weights, a block

// The gradient of spatial_weight from a sample: work.spatial [N, 2, k, k]. A block has kTaps of a row of taps.
__global__ void __launch_bounds__(kThreads) correlate_planes(Arguments args, Range range) {
  __shared__ double shared[kThreads];
  const CbamShape& s = args.pass.shape;
  const int k = static_cast<int>(s.k), h = static_cast<int>(s.h), w = static_cast<int>(s.w), pixels = h * w;
  const unsigned parts = (k + kTaps - 1) / kTaps, rows = 2 * k;
  const int first = static_cast<int>(blockIdx.x % parts) * kTaps, row = static_cast<int>(blockIdx.x / parts % rows);
  const int64_t n = range.first + blockIdx.x / parts / rows;
  const float* const d = args.work.d_scores + n * pixels;
  const float* const plane = args.pass.saved.planes + (2 * n + row / k) * pixels;
  float sums[kTaps] = {};
  for (int p = threadIdx.x; p < pixels; p += kThreads) {
    const int y = p / w + row % k - k / 2, x = p % w + first - k / 2;
    if (y < 0 || y >= h) continue;
    const float* const from = plane + static_cast<int64_t>(y) * w + x;
    const float by = d[p];
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      if (first + i < k && x + i >= 0 && x + i < w) sums[i] = fmaf(by, from[i], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    const double sum = add_block(sums[i], shared);
    if (threadIdx.x == 0 && first + i < k) {
      args.work.spatial[(n * rows + row) * k + first + i] = static_cast<float>(sum);
    }
  }
}

__global__ void __launch_bounds__(kThreads) finish_spatial(Arguments args) {
  const CbamShape& s = args.pass.shape;
  const int64_t taps = 2 * s.k * s.k, tap = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tap >= taps) return;
  double sum = 0.0;
  for (int64_t n = 0; n < s.n; ++n) sum += args.work.spatial[n * taps + tap];
  args.pass.g_spatial_weight[tap] = static_cast<float>(sum);
}

// ---- through the channel gate ------------------------------------------------------------------------------------

// What a thread needs of one sample's planes to get d u from g, u and a pixel.
struct Planes {
  SpatialGate spatial;
  const float *scores, *largest, *e_max, *e_mean;

  __device__ Planes(const Arguments& args, int64_t n)
      : spatial(args.pass.weights, moments_of(args.pass.saved, args.shared, n)) {
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
      : open(planes.spatial(planes.scores[p])), largest(planes.largest[p]), e_max(planes.e_max[p]),
        e_mean(planes.e_mean[p]) {}

  __device__ float d_u(float g, float u) const { return fmaf(g, open, e_mean + (u == largest ? e_max : 0.0f)); }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) sum_channels(Arguments args, Tiling t) {
  const Columns<V> at(t);
  const CbamBackwardArgs& pass = args.pass;
  const Planes planes(args, at.run);
  float gate[V] = {}, maximum[V] = {}, d_gate[V] = {}, tied[V] = {};
  if (at.active) {
    load_floats(pass.saved.gate + at.in_row(t), gate);
    load_floats(pass.saved.maximum + at.in_row(t), maximum);
  }
#pragma unroll 1
  for (int64_t p = at.first, from = at.at(t, p); p < at.last; p += at.rows, from += at.step) {
    float v[V], g[V];
    load<T, V>(static_cast<const typename T::Stored*>(pass.x) + from, v);
    load<T, V>(static_cast<const typename T::Stored*>(pass.g_y) + from, g);
    const AtPixel pixel(planes, p);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      d_gate[i] = fmaf(v[i], pixel.d_u(g[i], v[i] * gate[i]), d_gate[i]);
      tied[i] += v[i] == maximum[i] ? 1.0f : 0.0f;
    }
  }
  const float sum = add_rows(at, d_gate), pixels_tied = add_rows(at, tied);
  if (!at.owns(t)) return;
  float* const to = args.work.sums + (at.run * t.pieces + at.piece) * 2 * t.channels + at.column();
  to[0] = sum;
  to[t.channels] = pixels_tied;
}

// A block has a sample.
__global__ void __launch_bounds__(kThreads) gate_back(Arguments args, Range range) {
  const CbamShape& s = args.pass.shape;
  const CbamWeights& w = args.pass.weights;
  const int64_t n = range.first + blockIdx.x, pieces = ceiling(s.h * s.w, kPiece);
  for (int64_t c = threadIdx.x; c < s.c; c += kThreads) {
    double d_gate = 0.0, tied = 0.0;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const float* const from = args.work.sums + (n * pieces + piece) * 2 * s.c + c;
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
  float* const g_hidden = args.work.hidden + n * 2 * s.r;
  const int lane = threadIdx.x % kWarp;
  for (int64_t r = threadIdx.x / kWarp; r < s.r; r += kWarps) {
    float sum = 0.0f;
    for (int64_t c = lane; c < s.c; c += kWarp) sum = fmaf(w.expand_weight[c * s.r + r], logits[c], sum);
    sum = sum_over_group(sum, kWarp);
    if (lane < 2) g_hidden[lane * s.r + r] = hidden[lane * s.r + r] > 0.0f ? sum : 0.0f;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < s.c; c += kThreads) {
    float average = 0.0f, maximum = 0.0f;
    for (int64_t r = 0; r < s.r; ++r) {
      average = fmaf(w.reduce_weight[r * s.c + c], g_hidden[r], average);
      maximum = fmaf(w.reduce_weight[r * s.c + c], g_hidden[s.r + r], maximum);
    }
    args.work.average[n * s.c + c] = average;
    args.work.maximum[n * s.c + c] = maximum;
    if (args.pass.g_average) args.pass.g_average[n * s.c + c] = average;
    if (args.pass.g_maximum) args.pass.g_maximum[n * s.c + c] = maximum;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) apply_back(Arguments args, Tiling t) {
  const Columns<V> at(t);
  if (!at.active) return;
  const CbamBackwardArgs& pass = args.pass;
  const Planes planes(args, at.run);
  float gate[V], maximum[V], from_average[V], from_max[V], tied[V];
  load_floats(pass.saved.gate + at.in_row(t), gate);
  load_floats(pass.saved.maximum + at.in_row(t), maximum);
  load_floats(args.work.average + at.in_row(t), from_average);
  load_floats(args.work.maximum + at.in_row(t), from_max);
  load_floats(args.work.tied + at.in_row(t), tied);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    from_average[i] = pass.given.average ? 0.0f : from_average[i] / static_cast<float>(t.pixels);
    from_max[i] = pass.given.maximum ? 0.0f : from_max[i] / tied[i];
  }
#pragma unroll 1
  for (int64_t p = at.first, i = at.at(t, p); p < at.last; p += at.rows, i += at.step) {
    float v[V], g[V];
    load<T, V>(static_cast<const typename T::Stored*>(pass.x) + i, v);
    load<T, V>(static_cast<const typename T::Stored*>(pass.g_y) + i, g);
    const AtPixel pixel(planes, p);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float pooled = from_average[j] + (v[j] == maximum[j] ? from_max[j] : 0.0f);
      v[j] = fmaf(gate[j], pixel.d_u(g[j], v[j] * gate[j]), pooled);
    }
    store<T, V>(static_cast<typename T::Stored*>(pass.g_x) + i, v);
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
    to = pass.g_reduce_weight;
    for (int64_t n = 0; n < s.n && to; ++n) {
      const float* const hidden = args.work.hidden + n * 2 * s.r + r;
      sum += hidden[0] * pass.saved.average[n * s.c + c] + hidden[s.r] * pass.saved.maximum[n * s.c + c];
    }
  } else if ((i -= matrix) < matrix) {
    const int64_t c = i / s.r, r = i % s.r;
    to = pass.g_expand_weight;
    for (int64_t n = 0; n < s.n && to; ++n) {
      sum += args.work.logits[n * s.c + c] * pass.saved.hidden[(3 * n + 2) * s.r + r];
    }
  } else if ((i -= matrix) < s.r) {
    to = pass.g_reduce_bias;
    for (int64_t n = 0; n < 2 * s.n && to; ++n) sum += args.work.hidden[n * s.r + i];
  } else if ((i -= s.r) < s.c) {
    to = pass.g_expand_bias;
    for (int64_t n = 0; n < s.n && to; ++n) sum += 2.0f * args.work.logits[n * s.c + i];
  }
  if (to) to[i] = static_cast<float>(sum);
}

// ---- host --------------------------------------------------------------------------------------------------------

bool wants_mlp(const CbamBackwardArgs& args) {
  return args.g_reduce_weight || args.g_reduce_bias || args.g_expand_weight || args.g_expand_bias;
}

// Whether anything of the channel gate is wanted: it, its MLP, what it pools, or x.
bool wants_channels(const CbamBackwardArgs& args) {
  return args.g_x || args.g_average || args.g_maximum || wants_mlp(args);
}

template <class T, int V>
void run(Queue& queue, const Arguments& args) {
  const CbamBackwardArgs& pass = args.pass;
  const CbamShape& s = pass.shape;
  const int group = threads_a_pixel(s.c, V);
  const int64_t taps = 2 * s.k * s.k;
  const bool channels = wants_channels(pass), coupled = pass.batch && !pass.given.mean;
  const auto through_the_norm = [&](const Range& range) {
    const int64_t blocks = blocks_of_pixels(s, range, 1);
    if (channels || pass.g_spatial_weight) queue(find_d_scores, blocks, kThreads, args, range);
    if (pass.g_spatial_weight) {
      queue(correlate_planes, range.count * 2 * s.k * ceiling(s.k, kTaps), kThreads, args, range);
    }
    if (!channels) return;
    Tiling t(range.count, s.pixels(), s.c, kPiece, V);
    t.start = range.first;
    for_plane_size(s.k, [&](auto size) {
      queue(convolve_back<decltype(size)::value>, blocks, kThreads, args, range);
    });
    queue(sum_channels<T, V>, t.blocks(), kThreads, args, t);
    queue(gate_back, range.count, kThreads, args, range);
    if (pass.g_x) queue(apply_back<T, V>, t.blocks(), kThreads, args, t);
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
  if (pass.g_norm_weight || pass.g_norm_bias || pass.g_given_mean || pass.g_given_var) {
    queue(finish_norm, 1, kThreads, args);
  }
  if (pass.g_spatial_weight) queue(finish_spatial, ceiling(taps, kThreads), kThreads, args);
  if (wants_mlp(pass)) queue(finish_mlp, ceiling(2 * s.r * s.c + s.r + s.c, kThreads), kThreads, args);
}

}  // namespace

int64_t cbam_backward_floats(const CbamBackwardArgs& args) { return Work(args.shape, nullptr).floats; }

const char* cbam_backward(const CbamBackwardArgs& args, float* scratch, int device, void* stream) {
  Queue queue(device, stream);
  queue.take(too_large(args.shape));
  const Arguments all{args, Work(args.shape, scratch), args.batch || args.given.mean};
  for_vectors(args.shape.dtype, args.shape.c, [&](auto element, auto vector) {
    run<decltype(element), decltype(vector)::width>(queue, all);
  }, args.x, args.g_y, args.g_x, args.saved.gate);
  return queue.error();
}

}  // namespace cuda
}  // namespace raccgan
