// The CPU kernels of the anomaly score, one set a target; see targets.h for how one of them is chosen.
#pragma once

#include "../ops/anomaly_score.h"
#include "simd/targets.h"

namespace raccgan {

constexpr int64_t kImagePiece = 1024;     // pixels: a piece's sums (4 KiB of float32) stay in the first-level cache
constexpr int64_t kFeaturePiece = 16384;  // elements
// A piece of a channels_last image goes through a buffer that holds at least one pixel.
constexpr int64_t kMaxChannelsLast = 4096;

// Each function does the pieces begin <= i < end of all N * pieces(...) of them; a caller may split that range over
// threads as it likes.
#define RACCGAN_DECLARE(target, unused)                                         \
  namespace target {                                                            \
  void image_pieces(const ImageArgs& args, int64_t begin, int64_t end);         \
  void feature_pieces(const FeatureArgs& args, int64_t begin, int64_t end);     \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE

}  // namespace raccgan
