// The forward, backward and double backward pass of ops/depthwise.h on a GPU: deterministic, no atomics. Not yet run on
// a GPU.
#include "depthwise.h"
#include "convolve.h"
#include "correlate.h"

namespace raccgan::cuda {
namespace {
constexpr int64_t kTangentPixels = 512;  // a block

struct Needs {
  bool convolution, gradient, q, weights, tangent;
};

struct Workspace {
  float *mean, *var, *moments, *packed, *packed_transposed, *q, *tile_sums, *sums, *weights, *tangent_sums;
  float* tangent;  // [2, N, C]: means of t and of t z
  int64_t floats;

  Workspace(const DepthwiseLayer& s, const Needs& needs, float* memory) {
    const int64_t nc = s.n * s.c, pixels = s.h * s.w, weight = taps(s) * taps(s) * s.c;
    Scratch scratch(memory);
    mean = scratch.take(s.normalise, nc);
    var = scratch.take(s.normalise, nc);
    moments = scratch.take(s.normalise, moments_floats(moments_args(s, nullptr)));
    packed = scratch.take(needs.convolution, weight);
    packed_transposed = scratch.take(needs.gradient, weight);
    q = scratch.take(needs.q && s.dtype != Dtype::kFloat32, nc * pixels);
    const int64_t tile_count = tiles<Block>(resize_of(s.resize, true), s.h, s.w);
    tile_sums = scratch.take(needs.gradient, s.n * tile_count * kSums * s.c);
    sums = scratch.take(needs.gradient, kSums * nc);
    weights = scratch.take(needs.weights, correlate_splits(s) * weight);
    tangent_sums = scratch.take(needs.tangent, s.n * ceiling(pixels, kTangentPixels) * 2 * s.c);
    tangent = scratch.take(needs.tangent, 2 * nc);
    floats = scratch.floats();
  }
};

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
    queue.take(moments(moments_args(s, x), work.moments, work.mean, work.var, device, stream));
    norm = {work.mean, work.var, nullptr, nullptr};
    if (!t) return;
    for_vectors(s.dtype, s.c, [&](auto element, auto vector) {
      constexpr int V = decltype(vector)::width;
      const Tiling tiling(s.n, s.h * s.w, s.c, kTangentPixels, V);
      queue(sum_tangent<decltype(element), V>, tiling.blocks(), kThreads, s, norm, x, t, tiling, work.tangent_sums);
    }, x, t);
    const double over = 1.0 / static_cast<double>(s.h * s.w);
    add_up(ceiling(s.h * s.w, kTangentPixels), 2, over, work.tangent_sums, work.tangent);
    norm.t_mean = work.tangent;
    norm.tz_mean = work.tangent + s.n * s.c;
  }

  Image of_x() const { return {x, t, s.h, s.w}; }
  Image of_g() const { return {g, nullptr, s.out(s.h), s.out(s.w)}; }

  // y = L a, or L s.
  void convolve(void* y) {
    pack_weights(false, work.packed);
    const ConvolveArgs args{s, norm, of_x(), wide, work.packed, s.out(s.h), s.out(s.w), y};
    const Resize resize = resize_of(s.resize, false);
    t ? convolve_by<Tangent>(queue, resize, args) : convolve_by<Activated>(queue, resize, args);
  }

  // q = [a > 0] L^T g and its sums; writes slope q, and q, unless null.
  void convolve_back(void* scaled, float* q) {
    pack_weights(true, work.packed_transposed);
    const Resize resize = resize_of(s.resize, true);
    convolve_by<Unchanged>(queue, resize,
                           {s, norm, of_g(), wide, work.packed_transposed, s.h, s.w, scaled, x, t, q, work.tile_sums});
    add_up(tiles<Block>(resize, s.h, s.w), kSums, 1.0, work.tile_sums, work.sums);
  }

  void find_affine(float* grad_scale, float* grad_shift) {
    queue(finish_affine, ceiling(s.n * s.c, kThreads), kThreads, s, norm, t != nullptr, work.sums, grad_scale,
          grad_shift);
  }

  void finish(const float* q, void* grad_x) {
    for_vectors(s.dtype, s.c, [&](auto element, auto vector) {
      constexpr int V = decltype(vector)::width;
      const Tiling tiling(s.n, s.h * s.w, s.c, kTangentPixels, V);
      queue(finish_norm<decltype(element), V>, tiling.blocks(), kThreads,
            FinishArgs{s, norm, tiling, x, t, q, work.sums, grad_x});
    }, x, t, grad_x, s.scale);
  }

  void find_weights(float* grad_w) {
    const bool up = s.resize == Resize::kUp;
    const Image small = up ? of_x() : of_g(), large = up ? of_g() : of_x();
    const CorrelateArgs args{s, norm, small, large, wide, correlate_splits(s), work.weights};
    t ? correlate_by<Tangent>(queue, args) : correlate_by<Activated>(queue, args);
    queue(unpack, s.k * s.k * ceiling(s.c, kWarp), kThreads, s, args.splits, work.weights, grad_w);
  }

 private:
  void pack_weights(bool transposed, float* to) {
    queue(pack, ceiling(taps(s) * taps(s) * s.c, kThreads), kThreads, s, transposed, to);
  }

  void add_up(int64_t parts, int values, double factor, const float* partial, float* to) {
    queue(add_partial, s.n * ceiling(s.c, kWarp), kThreads, s.n, parts, values, s.c, factor, partial, to);
  }
};

Needs needs(const DepthwiseForwardArgs&) { return {true, false, false, false, false}; }

Needs needs(const DepthwiseBackwardArgs& args) {
  const bool gradient = args.grad_x || args.grad_scale;
  return {false, gradient, args.grad_x && args.layer.normalise, args.grad_w != nullptr, false};
}

Needs needs(const DepthwiseDoubleBackwardArgs& args) {
  const bool gradient = args.grad_x || args.grad_scale;
  return {args.grad_g != nullptr, gradient, args.grad_x != nullptr, args.grad_w != nullptr, args.layer.normalise};
}

template <class Args> int64_t floats_of(const Args& args) { return Workspace(args.layer, needs(args), nullptr).floats; }

// q as float32: in the memory of grad_x where that is float32 anyway.
template <class Args> float* q_of(const Args& args, const Workspace& work) {
  return args.layer.dtype == Dtype::kFloat32 ? static_cast<float*>(args.grad_x) : work.q;
}
}  // namespace

int64_t forward_floats(const DepthwiseForwardArgs& args) { return floats_of(args); }
int64_t backward_floats(const DepthwiseBackwardArgs& args) { return floats_of(args); }
int64_t double_backward_floats(const DepthwiseDoubleBackwardArgs& args) { return floats_of(args); }

const char* forward(const DepthwiseForwardArgs& args, float* scratch, int device, void* stream) {
  Queue queue(device, stream);
  const Workspace work(args.layer, needs(args), scratch);
  Pass pass(args.layer, work, queue, args.x, nullptr, nullptr);
  pass.find_norm(device, stream);
  pass.convolve(args.y);
  return queue.error();
}

const char* backward(const DepthwiseBackwardArgs& args, float* scratch, int device, void* stream) {
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

const char* double_backward(const DepthwiseDoubleBackwardArgs& args, float* scratch, int device, void* stream) {
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
}  // namespace raccgan::cuda
