// The forward pass of ops/depthwise.h, y = L relu(z scale + shift), alone and with the pointwise convolution after it.
#include "task.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
// Rows first <= row < last of each sample's y, which alone are stored; all of them, where x is normalised.
struct RowsArgs : DepthwiseForwardArgs {
  const float* bias;  // [C], added to y, or null
  int64_t first, last;
};

template <class T> void forward_task(const RowsArgs& args, const Task& a) {
  const DepthwiseLayer& s = a.s;
  float *const row = a.scratch, *scratch = row + row_floats(s);
  const RowRange rows = row_range(s, args.first, args.last);
  const Plane activated = take_plane(scratch, rows.until - rows.from, s.w);
  if (s.normalise) {
    const Norm norm = read_normalised<T>(a, args.x, activated);
    map_plane(activated, activated, [&](Floats h) RACCGAN_INLINE { return a.activated(norm, h); });
  } else {
    // Without a norm the ReLU does not wait for the whole plane.
    const Norm norm = norm_of(a, Floats{}, all(1));
    const View<T> view(args.x, s.h, s.w, s.c, a.l);
    for (int64_t h = rows.from; h < rows.until; ++h) {
      float* const to = activated.at(h - rows.from, 0);
      view.read(h, [&](int64_t i, Floats v)
                       RACCGAN_INLINE { store(to + i * kWidth, a.activated(norm, s.pre_relu ? rectified(v) : v)); });
    }
  }
  const Floats bias = args.bias ? load_lanes<Float32>(args.bias + a.l.channel, a.l, 0) : Floats{};
  write_convolved<T>(a, rows, activated, bias, args.y, row);
}
void forward_block(const RowsArgs& args, int64_t chunk, int64_t block, float* scratch) {
  const auto each = RACCGAN_OF_DTYPE(args.layer.dtype, forward_task);
  for_samples(args.layer, chunk, block, scratch, [&](const Task& a) { each(args, a); });
}

int64_t forward_floats(const DepthwiseLayer& s, int64_t rows) {
  const int64_t alone = s.resize == Resize::kDown ? 2 * rows : rows;
  return scratch_floats(s, 1, least(s.h, alone + s.k + 1));
}

// `args` with packed weights.
void forward_all(const DepthwiseForwardArgs& args, const float* bias) {
  const int64_t rows = args.layer.out(args.layer.h);
  const RowsArgs all{args, bias, 0, rows};
  for_blocks(args.layer, forward_floats(args.layer, rows),
             [&](int64_t chunk, int64_t block, float* scratch) { forward_block(all, chunk, block, scratch); });
}

// How a batch is split into chunks that threads take through both convolutions.
struct Chunks {
  int64_t samples;    // of a chunk: as many as fill a vector of a depthwise pass, for any target
  int64_t row_tiles;  // of these samples' y, for a chunk each
  int64_t count;      // zero where it does not pay
};

// May depend on the number of threads, since the bits do not depend on the chunks.
Chunks chunks_of(const DepthwiseLayer& layer) {
  constexpr int64_t kCache = 1 << 18;  // bytes of a tile in the second-level cache, beside the rows that it is made of
  constexpr int64_t kPixels = 4 * kRowsATask;  // that pay for reading all pointwise weights
  const int64_t rows = layer.out(layer.h), columns = layer.out(layer.w), threads = thread_count();
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

// The same layer for samples first <= n < first + count alone.
DepthwiseLayer samples_of(const DepthwiseLayer& layer, int64_t first, int64_t count) {
  DepthwiseLayer some = layer;
  some.n = count;
  if (some.scale != nullptr) some.scale += first * some.c, some.shift += first * some.c;
  return some;
}

// The results of the depthwise convolution are the left operand of the product while they are in the cache.
void convolve_by_chunks(const DepthwiseForwardArgs& args, const Chunks& chunks, const float* bias,
                        const ProductArgs& pointwise) {
  const DepthwiseLayer& layer = args.layer;
  const int64_t rows = layer.out(layer.h), columns = layer.out(layer.w), size = size_of(layer.dtype);
  const int64_t most_rows = rounded_up(rows, chunks.row_tiles) / chunks.row_tiles, x_size = layer.h * layer.w * layer.c;
  share_out(chunks.count, layer.n * x_size / chunks.count * layer.k, [&](int64_t begin, int64_t end) {
    const int64_t floats = forward_floats(layer, most_rows);
    const Memory<> scratch(floats), product_memory(product_scratch(pointwise));
    memset(scratch, 0, floats * sizeof(float));
    const Memory<char> u(chunks.samples * most_rows * columns * layer.c * size);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t sample = chunk / chunks.row_tiles * chunks.samples, tile = chunk % chunks.row_tiles;
      const int64_t first = rows * tile / chunks.row_tiles, last = rows * (tile + 1) / chunks.row_tiles;
      const DepthwiseLayer some = samples_of(layer, sample, least(chunks.samples, layer.n - sample));
      const RowsArgs part{{some, static_cast<const char*>(args.x) + sample * x_size * size, u}, bias, first, last};
      for (int64_t i = 0; i < sample_chunks(some); ++i) {
        for (int64_t block = 0; block < channel_blocks(some.c); ++block) forward_block(part, i, block, scratch);
      }
      product_of_rows(pointwise, (sample * rows + first) * columns, some.n * (last - first) * columns, u,
                      product_memory);
    }
  });
}
}  // namespace

void depthwise_forward(const DepthwiseForwardArgs& args) {
  const PackedLayer layer(args.layer);
  forward_all({layer, args.x, args.y}, nullptr);
}

void depthwise_separable(const DepthwiseForwardArgs& args, const float* bias, const ProductArgs& given) {
  const PackedLayer layer(args.layer);
  const Chunks chunks = chunks_of(layer);
  ProductArgs pointwise = given;
  if (chunks.count > 0) {  // the weights are packed once for all chunks
    const int64_t floats = given.packed == nullptr ? packed_factor(given) : 0;
    const Memory<> packed(floats);
    if (floats > 0) pack_factor(given, packed), pointwise.packed = packed;
    return convolve_by_chunks({layer, args.x, nullptr}, chunks, bias, pointwise);
  }
  const int64_t numbers = layer.n * layer.c * layer.out(layer.h) * layer.out(layer.w);
  const Memory<char> u(numbers * size_of(layer.dtype));
  if (numbers > 0) forward_all({layer, args.x, u}, bias);
  pointwise.a = u;
  product(pointwise);
}
}  // namespace raccgan::RACCGAN_TARGET
