// CBAM on a GPU, backward. From g = dL/dy; u = x gate, and spatial = sigmoid(normalised scores):
//
//     flow[n, p]  = spatial (1 - spatial) sum over c of g u            to the normalised scores
//     d s         = alpha flow + beta + gamma (s - mean)               through the norm and the moments
//     e_max, e_mean = correlations of d s with the two planes' weights;  e_max over the ties of the max, e_mean over C
//     d u         = g spatial + e_mean + e_max [u is the pixel's max]
//     d gate      = sum over p of x d u, through the MLP to d average and d max
//     d x         = gate d u + d average / P + d max / ties [x is the channel's max]
//
// Compiled for the architectures in setup.py and run on the PTX machine of tests/ptx, but not yet on a GPU: no speed is
// claimed for it. Three sweeps over x and g, a group of samples at a time as in forward.cu.
#include "backward_channels.h"

namespace raccgan {
namespace cuda {
namespace {

template <class T, int V>
void run(Queue& queue, const Arguments& args) {
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
    Tiling t(range.count, pixels(s), s.c, kPiece, V);
    t.start = range.first;
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

}  // namespace cuda
}  // namespace raccgan
