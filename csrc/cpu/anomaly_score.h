// The CPU kernels of the anomaly score, one set a target; see targets.h for how one of them is chosen.
#pragma once

#include "../ops/anomaly_score.h"
#include "simd/targets.h"

namespace raccgan {
constexpr int64_t kImageChunk = 1024;     // pixels: a chunk's sums (4 KiB of float32) stay in the first-level cache
constexpr int64_t kFeatureChunk = 16384;  // elements
// A chunk of a channels_last image goes through a buffer that holds at least one pixel.
constexpr int64_t kMaxChannelsLast = 4096;

// Each function does the chunks begin <= i < end of all N * chunks(...); a caller may split that range over threads.
#define RACCGAN_DECLARE(target, unused)                                     \
  namespace target {                                                        \
  void image_chunks(const ImageArgs& args, int64_t begin, int64_t end);     \
  void feature_chunks(const FeatureArgs& args, int64_t begin, int64_t end); \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE
}  // namespace raccgan
