// The CPU's side of the depthwise ops, the whole convolution without gradients, and the schemas.
#include "depthwise.h"
#include "../cpu/depthwise/depthwise.h"
#include "pointwise.h"

namespace raccgan { namespace {
AlignedFloats zeros(int64_t count) {
  AlignedFloats memory = aligned_floats(count);
  std::fill_n(memory.get(), count, 0.0f);
  return memory;
}

struct CpuCall : DepthwiseCall {
  AlignedFloats packed;

  CpuCall(const Tensor& x_in, const Tensor& w, const Optional& scale, const Optional& shift,
          const DepthwiseOptions& options)
      : DepthwiseCall(float32_or_bfloat16(x_in), w, scale, shift, options) {
    if (empty()) return;
    packed = aligned_floats(RACCGAN_SELECT(packed_floats)(layer));
    RACCGAN_SELECT(pack_weights)(layer, layer.weight, packed.get());
    layer.weight = packed.get();
  }

  void forward(const DepthwiseForwardArgs& args, const float* bias = nullptr) const {
    const int64_t rows = layer.out(layer.h);
    run(RACCGAN_SELECT(forward), DepthwiseRowsArgs{args, bias, 0, rows}, RACCGAN_SELECT(forward_scratch)(layer, rows));
  }
  void backward(const DepthwiseBackwardArgs& args, const Tensor& grad_w) const {
    run_gradients(RACCGAN_SELECT(backward), args, RACCGAN_SELECT(backward_scratch)(layer), grad_w);
  }
  void double_backward(const DepthwiseDoubleBackwardArgs& args, const Tensor& grad_w) const {
    run_gradients(RACCGAN_SELECT(double_backward), args, RACCGAN_SELECT(double_backward_scratch)(layer), grad_w);
  }

  // The same layer for samples first <= n < first + count alone.
  DepthwiseLayer samples(int64_t first, int64_t count) const {
    DepthwiseLayer some = layer;
    some.n = count;
    if (some.scale != nullptr) some.scale += first * some.c, some.shift += first * some.c;
    return some;
  }

  // Shares out the tasks of a pass, with so many floats of scratch memory for each thread.
  template <class Args>
  void run(void (*pass)(const Args&, float*, int64_t, int64_t), const Args& args, int64_t scratch) const {
    const int64_t tasks = RACCGAN_SELECT(tasks)(layer);
    share_out(tasks, x.numel() / tasks * layer.k,
              [&](int64_t begin, int64_t end) { pass(args, zeros(scratch).get(), begin, end); });
  }

  // The same for gradients: what the chunks of samples add to that of w is added up in `grad_w`, where it is needed.
  template <class Args>
  void run_gradients(void (*pass)(const Args&, float*, int64_t, int64_t), Args args, int64_t scratch,
                     const Tensor& grad_w) const {
    if (args.grad_w == nullptr) return run(pass, args, scratch);
    const int64_t size = layer.k * layer.k, c = layer.c, chunks = sample_chunks(layer);
    const auto partial = aligned_floats(chunks * size * c);
    args.grad_w = partial.get();
    run(pass, args, scratch);
    std::vector<float> by_tap(size * c);
    add_up(partial.get(), chunks, size * c, by_tap.data());
    float* const to = grad_w.mutable_data_ptr<float>();
    for (int64_t i = 0; i < size * c; ++i) to[i % c * size + i / c] = by_tap[i];
  }
};

// How a batch is split into chunks that threads take through both convolutions.
struct Chunks {
  int64_t samples;  // of a chunk: as many as fill a vector of a depthwise pass, for any target
  int64_t row_tiles;  // of these samples' y, for a chunk each
  int64_t count;  // zero where it does not pay
};

// May depend on the number of threads, since the bits do not depend on the chunks.
Chunks chunks_of(const DepthwiseLayer& layer) {
  constexpr int64_t kCache = 1 << 18;  // bytes of a tile in the second-level cache, beside the rows that it is made of
  constexpr int64_t kPixels = 4 * kRowsATask;  // that pay for reading all pointwise weights
  const int64_t rows = layer.out(layer.h), columns = layer.out(layer.w), threads = torch::stable::get_num_threads();
  if (layer.n * layer.c * rows * columns == 0) return {};
  Chunks chunks{layer.c < kMostLanes && layer.n > 1 ? kMostLanes / layer.c : 1, 1, 0};
  const int64_t groups = rounded_up(layer.n, chunks.samples) / chunks.samples;
  if (chunks.samples == 1 && !layer.normalise) {  // a norm looks at all rows first
    const int64_t paying = rounded_up(kPixels, columns) / columns;
    const int64_t tile = most(paying, kCache / (columns * layer.c * size_of(layer.dtype)));
    chunks.row_tiles = rounded_up(rows, tile) / tile;
    if (groups * chunks.row_tiles < 16 * threads && groups % threads != 0) {
      chunks.row_tiles = rounded_up(chunks.row_tiles, threads);
    }
  }
  const int64_t count = groups * chunks.row_tiles;
  const bool even = count >= 4 * threads || (count % threads == 0 && layer.n % chunks.samples == 0);
  if (even && rows / chunks.row_tiles * columns >= kRowsATask) chunks.count = count;
  return chunks;
}

// The results of the depthwise convolution are the left operand of the product while they are in the cache.
void convolve_by_chunks(const CpuCall& call, const Chunks& chunks, const Optional& bias, PointwiseCall& pointwise) {
  const DepthwiseLayer& layer = call.layer;
  const int64_t rows = layer.out(layer.h), columns = layer.out(layer.w), size = size_of(layer.dtype);
  const int64_t most_rows = rounded_up(rows, chunks.row_tiles) / chunks.row_tiles;
  const auto forward = RACCGAN_SELECT(forward);
  const auto tasks = RACCGAN_SELECT(tasks);
  const char* const x = static_cast<const char*>(call.x.const_data_ptr());
  pointwise.pack();
  share_out(chunks.count, call.x.numel() / chunks.count * layer.k, [&](int64_t begin, int64_t end) {
    const AlignedFloats scratch = zeros(RACCGAN_SELECT(forward_scratch)(layer, most_rows));
    const AlignedFloats u = aligned_floats(rounded_up(chunks.samples * most_rows * columns * layer.c * size, 4) / 4);
    const AlignedFloats product_scratch = aligned_floats(RACCGAN_SELECT(product_scratch)(pointwise.args));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t sample = chunk / chunks.row_tiles * chunks.samples, tile = chunk % chunks.row_tiles;
      const int64_t first = rows * tile / chunks.row_tiles, last = rows * (tile + 1) / chunks.row_tiles;
      const DepthwiseLayer some = call.samples(sample, least(chunks.samples, layer.n - sample));
      const void* const from = x + sample * layer.h * layer.w * layer.c * size;
      forward({{some, from, u.get()}, data_of(bias), first, last}, scratch.get(), 0, tasks(some));
      pointwise.rows((sample * rows + first) * columns, some.n * (last - first) * columns, u.get(),
                     product_scratch.get());
    }
  });
}

Tensor depthwise_separable_cpu(const Tensor& x, const Tensor& w, const Optional& bias_in, const Tensor& pointwise,
                               const Optional& pointwise_bias, const Optional& scale, const Optional& shift,
                               const Optional& residual, const Optional& packed, int64_t upsample, int64_t pool,
                               bool pre_relu, bool normalise, bool relu, double eps) {
  const CpuCall call(x, w, scale, shift, {upsample, pool, pre_relu, normalise, relu, eps});
  Optional bias;
  if (bias_in) bias = floats(*bias_in, call.layer.c, "the depthwise bias must be float32 [C]");
  const int64_t rows = call.layer.out(call.layer.h), columns = call.layer.out(call.layer.w);
  PointwiseCall product(call.x, call.layer.c, rows, columns, pointwise, pointwise_bias, residual, packed);
  const Chunks chunks = chunks_of(call.layer);
  if (chunks.count == 0) {
    const Tensor u = call.new_y(true);
    if (u.numel() != 0) call.forward({call.layer, call.x.const_data_ptr(), u.mutable_data_ptr()}, data_of(bias));
    product.all(u);
  } else {
    convolve_by_chunks(call, chunks, bias, product);
  }
  return product.y;
}
}}  // namespace raccgan

#define RACCGAN_LAYER                                                                         \
  "Tensor x, Tensor w, Tensor? scale, Tensor? shift, int upsample, int pool, bool pre_relu, " \
  "bool normalise, bool relu, float eps"

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def("depthwise_native(" RACCGAN_LAYER ") -> Tensor");
  // All of it in one call, without gradients, on a CPU alone.
  m.def(
      "depthwise_separable_native(Tensor x, Tensor w, Tensor? bias, Tensor pointwise, Tensor? pointwise_bias, "
      "Tensor? scale, Tensor? shift, Tensor? residual, Tensor? packed, int upsample, int pool, bool pre_relu, "
      "bool normalise, bool relu, float eps) -> Tensor");
  // All of it in one kernel, on a GPU alone.
  m.def(
      "depthwise_native_fused(Tensor x, Tensor w, Tensor pointwise, Tensor? bias, Tensor? scale, Tensor? shift, "
      "Tensor? residual, int upsample, int pool, bool pre_relu, bool normalise, bool relu, float eps, bool tf32) "
      "-> Tensor");
  m.def("depthwise_native_backward(Tensor g, " RACCGAN_LAYER
        ", bool needs_x, bool needs_w, bool needs_affine) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise_native_double_backward(Tensor t, Tensor g, " RACCGAN_LAYER
        ", bool needs_g, bool needs_x, bool needs_w, bool needs_scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("depthwise_native", TORCH_BOX(&raccgan::depthwise<raccgan::CpuCall>));
  m.impl("depthwise_separable_native", TORCH_BOX(&raccgan::depthwise_separable_cpu));
  m.impl("depthwise_native_backward", TORCH_BOX(&raccgan::depthwise_backward<raccgan::CpuCall>));
  m.impl("depthwise_native_double_backward", TORCH_BOX(&raccgan::depthwise_double_backward<raccgan::CpuCall>));
}
