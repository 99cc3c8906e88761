// The three passes of depthwise_separable.h on a GPU: deterministic, no atomics.
//
// Compiled for the architectures in setup.py and run on the PTX machine of tests/ptx, but not yet on a GPU: no speed is
// claimed for it.
//
// With P u = u - mean(u) - z mean(u z) and r = 1 / sqrt(var + eps), over the pixels of a sample's channel:
//
//     forward          y = L a,  a = relu(z scale + shift)
//     backward         q = [a > 0] L^T g,  grad_x = r scale P q,  grad_shift = sum q,  grad_scale = sum q z,
//                      grad_w = a correlated with g
//     double backward  u = r P t,  s = scale [a > 0] u,  grad_g = L s,  grad_w = s correlated with g,
//                      grad_scale = sum q u,  grad_x = -r^2 (A z + scale (mean(q z) P t + mean(t z) P q)),
//                      A = scale (mean(t q) - mean(t) mean(q) - mean(t z) mean(q z))
//
// Without the norm, r = 1, P u = u and the double backward's grad_x is zero. A ReLU before the norm multiplies t, and
// what leaves as grad_x, by [x > 0]. L and L^T are convolutions of depthwise_tiles.h; what they convolve is computed
// when a tile is read, what multiplies their results when a tile is written. A sum over pixels is taken tile by tile
// and finished by a launch of its own.
#include "depthwise_separable.h"

#include "depthwise_images.h"
#include "depthwise_norm.h"

namespace raccgan {
namespace cuda {
namespace {

// ---- the convolution ---------------------------------------------------------------------------------------------

struct ConvolveArgs {
  DepthwiseLayer layer;
  Norm norm;
  Image in;
  bool wide;              // whether every tensor allows 16-byte loads
  const float* packed;
  int64_t rows, columns;  // of the result
  void* result;           // the convolution, or slope q: the gradient without the norm. Or null
  const void *x, *t;      // where the result is the gradient of a; t or null
  float* q;               // q as it is, or null
  float* partial;         // [N, tiles, kSums, C]
};

template <int K, Form kForm>
using Block = Tile<K, kForm, kForm == Form::kDown ? 4 : 8>;

// Multiplies a strip of the gradient of a by [a > 0], writes it, and adds up q, q (h - centre) and q t.
template <class T, int kStrip>
__device__ void pass_back(const ConvolveArgs& args, const Coefficients& by, int64_t n, int64_t channel, int row,
                          int column, const float (&strip)[kStrip], float (&sums)[kSums]) {
  const DepthwiseLayer& s = args.layer;
  if (row >= args.rows || channel >= s.c) return;
  const int lane = threadIdx.x % kWarp, width = static_cast<int>(args.columns) - column;
  const float centre = by.centre[lane], slope = by.slope[lane], offset = by.offset[lane];
  const int64_t first = ((n * args.rows + row) * args.columns + column) * s.c + channel;
  const int channels = static_cast<int>(s.c);
  const auto* const x = static_cast<const typename T::Stored*>(args.x);
  const auto* const t = static_cast<const typename T::Stored*>(args.t);
  constexpr int kAhead = 4;  // loads before the first one is waited for
#pragma unroll
  for (int from = 0; from < kStrip; from += kAhead) {
    typename T::Stored xs[kAhead], ts[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = first + (from + i) * channels;
      if (from + i < width) xs[i] = x[at];
      if (from + i < width && t) ts[i] = t[at];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (from + i >= width) return;
      const float v = T::widen(xs[i]);
      const bool first_passes = !s.rectify_first || v > 0.0f;
      const float d = (s.rectify_first ? relu(v) : v) - centre;
      const bool passes = !s.rectify || fmaf(d, slope, offset) > 0.0f;
      const float q = passes ? strip[from + i] : 0.0f;
      sums[0] += q;
      sums[1] = fmaf(q, d, sums[1]);
      if (t && first_passes) sums[2] = fmaf(q, T::widen(ts[i]), sums[2]);
      const int64_t at = first + (from + i) * channels;
      if (args.q) args.q[at] = q;
      if (args.result) {
        static_cast<typename T::Stored*>(args.result)[at] = T::narrow(first_passes ? slope * q : 0.0f);
      }
    }
  }
}

template <class T, int kStrip>
__device__ void write(const ConvolveArgs& args, int64_t n, int64_t channel, int row, int column,
                      const float (&strip)[kStrip]) {
  if (row >= args.rows || channel >= args.layer.c) return;
  auto* const to = static_cast<typename T::Stored*>(args.result) +
                   ((n * args.rows + row) * args.columns + column) * args.layer.c + channel;
  const int width = static_cast<int>(args.columns) - column, channels = static_cast<int>(args.layer.c);
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    if (i < width) to[i * channels] = T::narrow(strip[i]);
  }
}

template <template <class, int> class Reader>
constexpr bool kBack = std::is_same_v<Reader<Float32, 1>, Given<Float32, 1>>;

// So many blocks a multiprocessor as it has registers for without a spill.
template <int K, Form kForm, bool kGradient>
constexpr int kResident = (kGradient && kForm == Form::kUp ? 512 : 768) / (Block<K, kForm>::kWarps * kWarp);

// L a or L s; or, by the reader of an image itself, L^T g and what follows from it.
template <template <class, int> class Reader, class T, int K, Form kForm>
__global__ void __launch_bounds__(Block<K, kForm>::kWarps* kWarp, kResident<K, kForm, kBack<Reader>>)
    convolve(ConvolveArgs args) {
  using Shape = Block<K, kForm>;
  auto& shared = *static_cast<Operands<Shape>*>(launched_shared());
  const DepthwiseLayer& s = args.layer;
  // A division of 64 bits is some hundred instructions; a grid's sizes have 32.
  const unsigned chunks = static_cast<unsigned>(ceiling(s.c, kWarp));
  const unsigned across = static_cast<unsigned>(ceiling(args.columns, Shape::kStrip));
  const unsigned tiles = static_cast<unsigned>(ceiling(args.rows, Shape::kHigh)) * across;
  const unsigned chunk = blockIdx.x % chunks, at = blockIdx.x / chunks % tiles;
  const int64_t n = blockIdx.x / chunks / tiles;
  const int first_row = static_cast<int>(at / across) * Shape::kHigh;
  const int column = static_cast<int>(at % across) * Shape::kStrip;
  shared.template load<Reader, T>(s, args.norm, args.in, args.wide, args.packed, n, chunk, first_row, column);
  float sums[kDeep][Shape::kStrip] = {};
  convolve_rows<K, kForm, Shape>(shared.tile, shared.weights, sums);

  const int64_t channel = chunk * kWarp + threadIdx.x % kWarp;
  const int row = first_row + threadIdx.x / kWarp * kDeep;
  if constexpr (!kBack<Reader>) {
#pragma unroll
    for (int o = 0; o < kDeep; ++o) write<T>(args, n, channel, row + o, column, sums[o]);
  } else {
    float totals[kSums] = {};
#pragma unroll
    for (int o = 0; o < kDeep; ++o) pass_back<T>(args, shared.by, n, channel, row + o, column, sums[o], totals);
    totals[1] *= shared.by.root[threadIdx.x % kWarp];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const double sum = add_warps(totals[i], reinterpret_cast<double*>(shared.tile), Shape::kWarps);
      if (threadIdx.x < kWarp && channel < s.c) {
        args.partial[((n * tiles + at) * kSums + i) * s.c + channel] = static_cast<float>(sum);
      }
    }
  }
}

// ---- the gradient of w -------------------------------------------------------------------------------------------

struct CorrelateArgs {
  DepthwiseLayer layer;
  Norm norm;
  Image small, large;
  bool wide;
  int64_t pieces;
  float* partial;  // [pieces, taps, taps, C], out
};

template <class Shape>
struct PairOperands {
  alignas(16) float small[Shape::kRows * Shape::kStrip * kWarp];
  alignas(16) float large[Shape::kLargeRows * Shape::kLargeColumns * kWarp];
  Coefficients by;
};

// The warps have the taps of different rows: at the end they add them up where the tiles were.
template <class Shape>
union PairShared {
  PairOperands<Shape> operands;
  float totals[Shape::kTaps * Shape::kTaps][Shape::kWarps][kWarp];
};

// A block has a warp of channels and a piece: every `pieces`-th tile of the batch.
template <template <class, int> class Small, template <class, int> class Large, class T, int K, int kStep>
__global__ void __launch_bounds__(Pair<K, kStep>::kWarps* kWarp, 2) correlate(CorrelateArgs args) {
  using Shape = Pair<K, kStep>;
  constexpr int kBlock = Shape::kWarps * kWarp, kTaps = Shape::kTaps;
  auto& all = *static_cast<PairShared<Shape>*>(launched_shared());
  auto& shared = all.operands;
  const DepthwiseLayer& s = args.layer;
  const int64_t chunks = ceiling(s.c, kWarp), chunk = blockIdx.x % chunks, piece = blockIdx.x / chunks;
  const int64_t across = ceiling(args.small.columns, Shape::kStrip);
  const int64_t tiles = ceiling(args.small.rows, Shape::kRows) * across;
  float totals[kTaps][kTaps] = {};
  for (int64_t i = piece; i < s.n * tiles; i += args.pieces) {
    const int64_t n = i / tiles;
    const int row = static_cast<int>(i % tiles / across) * Shape::kRows;
    const int column = static_cast<int>(i % across) * Shape::kStrip;
    __syncthreads();
    find(s, args.norm, n, chunk, shared.by);
    __syncthreads();
    fill<Small, T, Shape::kRows, Shape::kStrip, kBlock, 2>(s, args.small, args.wide, shared.by, n, chunk, row, column,
                                                        shared.small);
    fill<Large, T, Shape::kLargeRows, Shape::kLargeColumns, kBlock, 2>(
        s, args.large, args.wide, shared.by, n, chunk, kStep * row - K / 2, kStep * column - K / 2, shared.large);
    __syncthreads();
    correlate_rows<K, kStep>(shared.small, shared.large, totals);
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap) all.totals[tap][warp][lane] = totals[tap / kTaps][tap % kTaps];
  __syncthreads();
  const int64_t channel = chunk * kWarp + lane;
  if (channel >= s.c) return;
  for (int tap = warp; tap < kTaps * kTaps; tap += Shape::kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::kWarps; ++i) sum += all.totals[tap][i][lane];
    args.partial[(piece * kTaps * kTaps + tap) * s.c + channel] = sum;
  }
}

// The gradient of w from that of what `pack` packs, partial [pieces, taps, taps, C]. A block has one place of w and a
// warp of channels; its warps take the pieces in turn.
__global__ void __launch_bounds__(kThreads) unpack(DepthwiseLayer s, int64_t pieces, const float* partial,
                                                   float* grad_w) {
  __shared__ double shared[kThreads];
  const int64_t chunks = ceiling(s.c, kWarp), n = taps(s), size = s.k * s.k, place = blockIdx.x / chunks;
  const int64_t channel = blockIdx.x % chunks * kWarp + threadIdx.x % kWarp;
  const bool plain = s.resize == Resize::kPlain;
  const int64_t at = s.resize == Resize::kUp ? size - 1 - place : place;
  double sum = 0.0;
  for (int64_t piece = threadIdx.x / kWarp; piece < pieces && channel < s.c; piece += kWarps) {
    const float* const from = partial + piece * n * n * s.c + channel;
    for (int64_t r = 0; r < (plain ? 1 : 2); ++r) {
      for (int64_t c = 0; c < (plain ? 1 : 2); ++c) sum += from[((at / s.k + r) * n + at % s.k + c) * s.c];
    }
  }
  sum = add_warps(sum, shared, kWarps);
  if (threadIdx.x >= kWarp || channel >= s.c) return;
  grad_w[channel * size + place] = static_cast<float>(s.resize == Resize::kDown ? 0.25 * sum : sum);
}

// ---- host --------------------------------------------------------------------------------------------------------

template <template <class, int> class Reader, int K, Form kForm>
void convolve_as(Queue& queue, const ConvolveArgs& args) {
  using Shape = Block<K, kForm>;
  const int64_t blocks = args.layer.n * tiles<Block>(kForm, args.rows, args.columns) * ceiling(args.layer.c, kWarp);
  for_dtype(args.layer.dtype, [&](auto element) {
    queue.with_shared(sizeof(Operands<Shape>), convolve<Reader, decltype(element), K, kForm>, blocks,
                      Shape::kWarps * kWarp, args);
  });
}

template <template <class, int> class Reader>
void convolve_by(Queue& queue, Form form, const ConvolveArgs& args) {
  for_size(args.layer.k, [&](auto k) {
    constexpr int K = decltype(k)::value;
    switch (form) {
      case Form::kPlain: convolve_as<Reader, K, Form::kPlain>(queue, args); break;
      case Form::kDown: convolve_as<Reader, K, Form::kDown>(queue, args); break;
      case Form::kUp: convolve_as<Reader, K, Form::kUp>(queue, args); break;
    }
  });
}

template <template <class, int> class Small, template <class, int> class Large, int K, int kStep>
void correlate_as(Queue& queue, const CorrelateArgs& args) {
  using Shape = Pair<K, kStep>;
  const int64_t blocks = args.pieces * ceiling(args.layer.c, kWarp);
  for_dtype(args.layer.dtype, [&](auto element) {
    queue.with_shared(sizeof(PairShared<Shape>), correlate<Small, Large, decltype(element), K, kStep>, blocks,
                      Shape::kWarps * kWarp, args);
  });
}

// `Reader` is that of x.
template <template <class, int> class Reader>
void correlate_by(Queue& queue, const CorrelateArgs& args) {
  for_size(args.layer.k, [&](auto k) {
    constexpr int K = decltype(k)::value;
    switch (args.layer.resize) {
      case Resize::kPlain: correlate_as<Given, Reader, K, 1>(queue, args); break;
      case Resize::kDown: correlate_as<Given, Reader, K, 2>(queue, args); break;
      case Resize::kUp: correlate_as<Reader, Given, K, 2>(queue, args); break;
    }
  });
}

constexpr int64_t kTangentPiece = 512;  // pixels
constexpr int64_t kCorrelateBlocks = 512;

// So many pieces that they fill a GPU, by the shape alone.
int64_t correlate_pieces(const DepthwiseLayer& s) {
  const bool plain = s.resize == Resize::kPlain, up = s.resize == Resize::kUp;
  const int64_t rows = up ? s.h : s.out(s.h), columns = up ? s.w : s.out(s.w);
  const int64_t down = ceiling(rows, plain ? Pair<3, 1>::kRows : Pair<3, 2>::kRows);
  const int64_t all = s.n * down * ceiling(columns, Pair<3, 1>::kStrip);
  const int64_t wanted = ceiling(kCorrelateBlocks, ceiling(s.c, kWarp));
  return wanted < all ? wanted : all;
}

// What a pass needs beyond its outputs.
struct Needs {
  bool convolution, gradient, q, weights, tangent;
};

// The scratch memory of a pass; only what it needs has a place.
struct Workspace {
  float *mean = nullptr, *var = nullptr, *moments = nullptr, *packed = nullptr, *packed_transposed = nullptr;
  float *q = nullptr, *tile_sums = nullptr, *sums = nullptr, *weights = nullptr, *tangent_sums = nullptr;
  float* tangent = nullptr;  // [2, N, C]: means of t and of t z
  int64_t floats = 0;

  Workspace(const DepthwiseLayer& s, const Needs& needs, float* memory) {
    const int64_t nc = s.n * s.c, pixels = s.h * s.w;
    const auto next = [&](bool needed, int64_t count) {
      const int64_t at = floats;
      floats += needed ? ceiling(count, 4) * 4 : 0;  // each on a 16-byte boundary
      return needed && memory ? memory + at : nullptr;
    };
    mean = next(s.normalise, nc);
    var = next(s.normalise, nc);
    moments = next(s.normalise, moments_floats(runs_of(s, nullptr)));
    packed = next(needs.convolution, taps(s) * taps(s) * s.c);
    packed_transposed = next(needs.gradient, taps(s) * taps(s) * s.c);
    q = next(needs.q && s.dtype != Dtype::kFloat32, nc * pixels);
    tile_sums = next(needs.gradient, s.n * tiles<Block>(form_of(s.resize, true), s.h, s.w) * kSums * s.c);
    sums = next(needs.gradient, kSums * nc);
    weights = next(needs.weights, correlate_pieces(s) * taps(s) * taps(s) * s.c);
    tangent_sums = next(needs.tangent, s.n * ceiling(pixels, kTangentPiece) * 2 * s.c);
    tangent = next(needs.tangent, 2 * nc);
  }
};

// One pass: the steps that the three have in common.
struct Pass {
  const DepthwiseLayer& s;
  const Workspace& work;
  Queue& queue;
  const void *x, *t, *g;  // t and g, or null
  bool wide;
  Norm norm{};

  Pass(const DepthwiseLayer& s, const Workspace& work, Queue& queue, const void* x, const void* t, const void* g)
      : s(s), work(work), queue(queue), x(x), t(t), g(g), wide(false) {
    queue.take(too_large(s));
    for_vectors(s.dtype, s.c, [&](auto, auto vector) { wide = decltype(vector)::width > 1; }, x, t, g);
  }

  void find_norm(int device, void* stream) {
    if (!s.normalise) return;
    queue.take(moments(runs_of(s, x), work.moments, work.mean, work.var, device, stream));
    norm = {work.mean, work.var, nullptr, nullptr};
    if (!t) return;
    for_vectors(s.dtype, s.c, [&](auto element, auto vector) {
      constexpr int V = decltype(vector)::width;
      const Tiling tiling(s.n, s.h * s.w, s.c, kTangentPiece, V);
      queue(sum_tangent<decltype(element), V>, tiling.blocks(), kThreads, s, norm, x, t, tiling, work.tangent_sums);
    }, x, t);
    const double over = 1.0 / static_cast<double>(s.h * s.w);
    add_up(ceiling(s.h * s.w, kTangentPiece), 2, over, work.tangent_sums, work.tangent);
    norm.t_mean = work.tangent;
    norm.tz_mean = work.tangent + s.n * s.c;
  }

  Image of_x() const { return {x, t, s.h, s.w}; }
  Image of_g() const { return {g, nullptr, s.out(s.h), s.out(s.w)}; }

  // y = L a, or L s.
  void convolve(void* y) {
    pack_weights(false, work.packed);
    const ConvolveArgs args{s, norm, of_x(), wide, work.packed, s.out(s.h), s.out(s.w), y};
    const Form form = form_of(s.resize, false);
    t ? convolve_by<Tangent>(queue, form, args) : convolve_by<Activated>(queue, form, args);
  }

  // q = [a > 0] L^T g and its sums; writes slope q, and q where they are wanted.
  void convolve_back(void* scaled, float* q) {
    pack_weights(true, work.packed_transposed);
    const Form form = form_of(s.resize, true);
    convolve_by<Given>(queue, form, {s, norm, of_g(), wide, work.packed_transposed, s.h, s.w, scaled, x, t, q,
                                     work.tile_sums});
    add_up(tiles<Block>(form, s.h, s.w), kSums, 1.0, work.tile_sums, work.sums);
  }

  void find_affine(float* grad_scale, float* grad_shift) {
    queue(finish_affine, ceiling(s.n * s.c, kThreads), kThreads, s, norm, t != nullptr, work.sums, grad_scale, grad_shift);
  }

  void finish(const float* q, void* grad_x) {
    for_vectors(s.dtype, s.c, [&](auto element, auto vector) {
      constexpr int V = decltype(vector)::width;
      const Tiling tiling(s.n, s.h * s.w, s.c, kTangentPiece, V);
      queue(finish_norm<decltype(element), V>, tiling.blocks(), kThreads,
            FinishArgs{s, norm, tiling, x, t, q, work.sums, grad_x});
    }, x, t, grad_x, s.scale);
  }

  void find_weights(float* grad_w) {
    const bool up = s.resize == Resize::kUp;
    const CorrelateArgs args{s, norm, up ? of_x() : of_g(), up ? of_g() : of_x(), wide, correlate_pieces(s), work.weights};
    t ? correlate_by<Tangent>(queue, args) : correlate_by<Activated>(queue, args);
    queue(unpack, s.k * s.k * ceiling(s.c, kWarp), kThreads, s, args.pieces, work.weights, grad_w);
  }

 private:
  void pack_weights(bool transposed, float* to) {
    queue(pack, ceiling(taps(s) * taps(s) * s.c, kThreads), kThreads, s, transposed, to);
  }

  void add_up(int64_t pieces, int values, double factor, const float* partial, float* to) {
    queue(add_pieces, s.n * ceiling(s.c, kWarp), kThreads, s.n, pieces, values, s.c, factor, partial, to);
  }
};

Needs needs(const ForwardArgs&) { return {true, false, false, false, false}; }

Needs needs(const BackwardArgs& args) {
  const bool gradient = args.grad_x || args.grad_scale;
  return {false, gradient, args.grad_x && args.layer.normalise, args.grad_w != nullptr, false};
}

Needs needs(const DoubleBackwardArgs& args) {
  const bool gradient = args.grad_x || args.grad_scale;
  return {args.grad_g != nullptr, gradient, args.grad_x != nullptr, args.grad_w != nullptr, args.layer.normalise};
}

template <class Args>
int64_t floats_of(const Args& args) {
  return Workspace(args.layer, needs(args), nullptr).floats;
}

// q as float32: in the memory of grad_x where that is float32 anyway.
template <class Args>
float* q_of(const Args& args, const Workspace& work) {
  return args.layer.dtype == Dtype::kFloat32 ? static_cast<float*>(args.grad_x) : work.q;
}

}  // namespace

int64_t forward_floats(const ForwardArgs& args) { return floats_of(args); }
int64_t backward_floats(const BackwardArgs& args) { return floats_of(args); }
int64_t double_backward_floats(const DoubleBackwardArgs& args) { return floats_of(args); }

const char* forward(const ForwardArgs& args, float* scratch, int device, void* stream) {
  Queue queue(device, stream);
  const Workspace work(args.layer, needs(args), scratch);
  Pass pass(args.layer, work, queue, args.x, nullptr, nullptr);
  pass.find_norm(device, stream);
  pass.convolve(args.y);
  return queue.error();
}

const char* backward(const BackwardArgs& args, float* scratch, int device, void* stream) {
  Queue queue(device, stream);
  const Workspace work(args.layer, needs(args), scratch);
  Pass pass(args.layer, work, queue, args.x, nullptr, args.g);
  pass.find_norm(device, stream);
  if (args.grad_w) pass.find_weights(args.grad_w);
  if (!args.grad_x && !args.grad_scale) return queue.error();
  const bool finish = args.grad_x && args.layer.normalise;
  float* const q = finish ? q_of(args, work) : nullptr;
  pass.convolve_back(finish ? nullptr : args.grad_x, q);
  if (args.grad_scale) pass.find_affine(args.grad_scale, args.grad_shift);
  if (finish) pass.finish(q, args.grad_x);
  return queue.error();
}

const char* double_backward(const DoubleBackwardArgs& args, float* scratch, int device, void* stream) {
  Queue queue(device, stream);
  const Workspace work(args.layer, needs(args), scratch);
  Pass pass(args.layer, work, queue, args.x, args.t, args.g);
  pass.find_norm(device, stream);
  if (args.grad_g) pass.convolve(args.grad_g);
  if (args.grad_w) pass.find_weights(args.grad_w);
  if (!args.grad_x && !args.grad_scale) return queue.error();
  float* const q = args.grad_x ? q_of(args, work) : nullptr;
  pass.convolve_back(nullptr, q);
  if (args.grad_scale) pass.find_affine(args.grad_scale, nullptr);
  if (args.grad_x) pass.finish(q, args.grad_x);
  return queue.error();
}

}  // namespace cuda
}  // namespace raccgan
