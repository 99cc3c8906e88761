// The CPU kernels of ops/depthwise.h; one set a target, see simd/targets.h. They take float32 and bfloat16.
#pragma once

#include "../../ops/depthwise.h"
#include "../simd/targets.h"

namespace raccgan {
// Rows first <= row < last of each sample's y, which alone are stored; all of them, where x is normalised.
struct DepthwiseRowsArgs : DepthwiseForwardArgs {
  const float* bias;  // [C], added to y, or null
  int64_t first, last;
};

// Chunks are samples, by the shape alone, never by threads or hardware, so that a sum over chunks is always the same
// sum.
constexpr int64_t kMostLanes = 16;  // of any target's vectors
static constexpr int64_t samples_a_chunk(const DepthwiseLayer& s) {
  return most(1024 / most(1, s.h * s.w), s.c < kMostLanes ? kMostLanes : 1);
}
static constexpr int64_t sample_chunks(const DepthwiseLayer& s) {
  return rounded_up(s.n, samples_a_chunk(s)) / samples_a_chunk(s);
}

// A pass does the tasks begin <= i < end of a call's `tasks`. A caller may split them over threads in any way, with
// _scratch floats for each thread, all zero and aligned to 64 bytes. pack_weights reads float32 w [C, 1, k, k] and
// writes packed_floats floats.
#define RACCGAN_DECLARE(target, unused)                                                                      \
  namespace target {                                                                                         \
  int64_t packed_floats(const DepthwiseLayer& layer);                                                        \
  void pack_weights(const DepthwiseLayer& layer, const float* w, float* packed);                             \
  int64_t tasks(const DepthwiseLayer& layer);                                                                \
  int64_t forward_scratch(const DepthwiseLayer& layer, int64_t rows);                                        \
  int64_t backward_scratch(const DepthwiseLayer& layer);                                                     \
  int64_t double_backward_scratch(const DepthwiseLayer& layer);                                              \
  void forward(const DepthwiseRowsArgs& args, float* scratch, int64_t begin, int64_t end);                   \
  void backward(const DepthwiseBackwardArgs& args, float* scratch, int64_t begin, int64_t end);              \
  void double_backward(const DepthwiseDoubleBackwardArgs& args, float* scratch, int64_t begin, int64_t end); \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE
}  // namespace raccgan
