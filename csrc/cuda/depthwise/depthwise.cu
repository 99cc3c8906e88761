// The forward, backward and double backward pass of ops/depthwise.h on a GPU: deterministic, no atomics.
#include "convolve.h"
#include "correlate.h"

namespace raccgan::cuda {
namespace {
constexpr int64_t kTangentPixels = 512;  // a block

// What a pass is given, and what it writes; null where there is none.
struct Tensors {
  DepthwiseLayer layer;
  const void *x, *t, *g;
  void *y, *grad_x;  // y = L a, or L s
  float *grad_w, *grad_scale, *grad_shift;
};

Tensors tensors(const DepthwiseForwardArgs& args) { return {args.layer, args.x, nullptr, nullptr, args.y}; }

Tensors tensors(const DepthwiseBackwardArgs& args) {
  return {args.layer, args.x, nullptr, args.g, nullptr, args.grad_x, args.grad_w, args.grad_scale, args.grad_shift};
}

Tensors tensors(const DepthwiseDoubleBackwardArgs& args) {
  return {args.layer, args.x, args.t, args.g, args.grad_g, args.grad_x, args.grad_w, args.grad_scale};
}

// A pass with its scratch memory. A gradient of x goes back through the norm by q, which is written to grad_x's memory
// where that is float32 anyway.
struct Pass : Tensors {
  Scratch scratch;
  LayerMoments moments{layer, x, scratch};
  const int64_t nc = layer.n * layer.c, pixels = layer.h * layer.w, weight = taps(layer) * taps(layer) * layer.c;
  const int64_t back_tiles = tiles(back(), warps_of(back()), layer.h, layer.w);
  const int64_t tangent_tiles = ceiling(pixels, kTangentPixels);
  const bool needs_q = grad_x || grad_scale, through_norm = grad_x && layer.normalise, tangent = t && layer.normalise;
  float* packed = scratch.take(weight, y || needs_q);
  float* q = scratch.take(nc * pixels, layer.dtype != Dtype::kFloat32 && through_norm);
  float* tile_sums = scratch.take(layer.n * back_tiles * kSums * layer.c, needs_q);
  float* sums = scratch.take(kSums * nc, needs_q);
  float* weights = scratch.take(correlate_splits(layer) * weight, grad_w);
  float* tangent_sums = scratch.take(layer.n * tangent_tiles * 2 * layer.c, tangent);
  float *t_mean = scratch.take(2 * nc, tangent), *tz_mean = t_mean ? t_mean + nc : nullptr;
  const NormedLayer s{layer, moments.mean, moments.var, t_mean, tz_mean};
  const Image of_x{x, t, layer.h, layer.w, allow_vectors(layer.dtype, layer.c, x, t)};
  const Image of_g{g, nullptr, layer.out(layer.h), layer.out(layer.w), allow_vectors(layer.dtype, layer.c, g)};

  Pass(const Tensors& given, float* memory) : Tensors(given), scratch{memory} {}

  // The resizing of the transpose.
  Resize back() const {
    return layer.resize == Resize::kUp ? Resize::kDown : layer.resize == Resize::kDown ? Resize::kUp : Resize::kNone;
  }

  void run(Queue& queue) {
    queue.take(too_large(layer));
    moments.find(queue);
    if (tangent) find_tangent(queue);
    if (y) {
      pack_weights(queue, layer, false, packed);
      const ConvolveArgs args{s, of_x, packed, of_g.rows, of_g.columns, y};
      t ? convolve_by<Tangent>(queue, layer.resize, args) : convolve_by<Activated>(queue, layer.resize, args);
    }
    if (grad_w) find_weights(queue);
    if (needs_q) convolve_back(queue);
    if (grad_scale) {
      queue(finish_affine, ceiling(nc, kThreads), kThreads, s, t != nullptr, sums, grad_scale, grad_shift);
    }
    if (through_norm) finish(queue);
  }

  void find_tangent(Queue& queue) {
    for_vectors(layer.dtype, layer.c, [&](auto element, auto vector) {
      const Tiling tiling{layer.n, pixels, layer.c, kTangentPixels, vector};
      queue(sum_tangent<decltype(element), vector>, tiling.blocks(), kThreads, s, x, t, tiling, tangent_sums);
    }, x, t);
    add_up(queue, tangent_tiles, 2, 1.0 / static_cast<double>(pixels), tangent_sums, t_mean);
  }

  void find_weights(Queue& queue) {
    const bool up = layer.resize == Resize::kUp;
    const CorrelateArgs args{s, up ? of_x : of_g, up ? of_g : of_x, correlate_splits(layer), weights};
    t ? correlate_by<Tangent>(queue, args) : correlate_by<Activated>(queue, args);
    queue(unpack, layer.k * layer.k * ceiling(layer.c, kWarp), kThreads, layer, args.splits, weights, grad_w);
  }

  // q = [a > 0] L^T g and its sums, and without the norm grad_x = slope q.
  void convolve_back(Queue& queue) {
    if (through_norm && !q) q = static_cast<float*>(grad_x);
    pack_weights(queue, layer, true, packed);
    convolve_by<Unchanged>(queue, back(),
                           {s, of_g, packed, layer.h, layer.w, layer.normalise ? nullptr : grad_x, x, t, q, tile_sums});
    add_up(queue, back_tiles, kSums, 1.0, tile_sums, sums);
  }

  void finish(Queue& queue) {
    for_vectors(layer.dtype, layer.c, [&](auto element, auto vector) {
      const Tiling tiling{layer.n, pixels, layer.c, kTangentPixels, vector};
      queue(finish_norm<decltype(element), vector>, tiling.blocks(), kThreads, s, tiling, x, t, q, sums, grad_x);
    }, x, t, grad_x, layer.scale);
  }

  void add_up(Queue& queue, int64_t parts, int values, double factor, const float* partial, float* to) {
    queue(add_partial, layer.n * ceiling(layer.c, kWarp), kThreads, layer.n, parts, values, layer.c, factor, partial,
          to);
  }
};
}  // namespace

#define RACCGAN_PASS(Args)                                                                         \
  int64_t scratch_floats(const Args& args) { return Pass(tensors(args), nullptr).scratch.floats; } \
  const char* queue_pass(const Args& args, float* scratch, int device, void* stream) {             \
    Queue queue(device, stream);                                                                   \
    Pass(tensors(args), scratch).run(queue);                                                       \
    return queue.error;                                                                            \
  }
RACCGAN_PASS(DepthwiseForwardArgs)
RACCGAN_PASS(DepthwiseBackwardArgs)
RACCGAN_PASS(DepthwiseDoubleBackwardArgs)
}  // namespace raccgan::cuda
