// The forward pass of ops/depthwise.h: y = L relu(z scale + shift).
#include "task.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
template <class T> void forward_task(const DepthwiseRowsArgs& args, const Task& a) {
  const DepthwiseLayer& s = a.s;
  float *const row = a.scratch, *scratch = row + row_floats(s);
  const RowRange rows = row_range(s, args.first, args.last);
  const Plane activated = take_plane(scratch, rows.until - rows.from, s.w);
  if (s.normalise) {
    const Norm norm = read_normalised<T>(a, args.x, activated);
    map_plane(activated, activated, [&](Floats h) RACCGAN_INLINE { return a.activated(norm, h); });
  } else {
    // Without a norm the ReLU does not wait for the whole plane.
    const Norm norm = norm_of(a, Floats{}, broadcast(1));
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
}  // namespace

int64_t tasks(const DepthwiseLayer& layer) { return sample_chunks(layer) * channel_blocks(layer.c); }

int64_t forward_scratch(const DepthwiseLayer& layer, int64_t rows) {
  const int64_t alone = layer.resize == Resize::kDown ? 2 * rows : rows;
  return scratch_floats(layer, 1, least(layer.h, alone + layer.k + 1));
}

void forward(const DepthwiseRowsArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto each = RACCGAN_OF_DTYPE(args.layer.dtype, forward_task);
  run(args.layer, scratch, begin, end, [&](const Task& a) { each(args, a); }, [](int64_t, int64_t) {});
}
}  // namespace raccgan::RACCGAN_TARGET
