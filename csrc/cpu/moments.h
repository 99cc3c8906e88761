// The CPU kernels of ops/moments.h; one set a target, see simd/targets.h. They take one group of float32 or bfloat16.
#pragma once

#include "../ops/moments.h"
#include "simd/targets.h"

namespace raccgan {
// grad[pixel, c] = slope[c] (x[pixel, c] - center[c]) + constant[c]: nothing cancels where x is far from zero.
struct AffineArgs {
  MomentsArgs of;
  const float *slope, *center, *constant;  // [C] each
  void* grad;                              // like x, out
};

constexpr int64_t kMomentsChunk = 1024;  // pixels: what float32 adds up before float64 does; never by threads
static constexpr int64_t moments_chunks(int64_t pixels) { return rounded_up(pixels, kMomentsChunk) / kMomentsChunk; }

// A task is some channels of a chunk, so that threads share a small batch of many channels too.
constexpr int64_t kMomentsChannels = 64;
static constexpr int64_t moments_tasks(int64_t pixels, int64_t channels) {
  return moments_chunks(pixels) * (rounded_up(channels, kMomentsChannels) / kMomentsChannels);
}

// find_center writes roughly the mean, center [C]. moments writes the sums of d and d^2 over each chunk, d = x -
// center: partial [chunks, 2, C]. A caller may split the tasks begin <= i < end, or the pixels of affine, over threads.
#define RACCGAN_DECLARE(target, unused)                                                                   \
  namespace target {                                                                                      \
  void find_center(const MomentsArgs& args, float* center);                                               \
  void moments(const MomentsArgs& args, const float* center, float* partial, int64_t begin, int64_t end); \
  void affine(const AffineArgs& args, int64_t begin, int64_t end);                                        \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE
}  // namespace raccgan
