// The CPU kernels of the moments of each channel over batch and pixels; one set a target, see targets.h.
//
//     mean[c] = mean of x[., c],   var[c] = mean of (x[., c] - mean[c])^2
//
// Everything is [M, C] in memory, M = N * H * W pixels, without gaps.
#pragma once

#include "../ops/dtype.h"
#include "simd/integers.h"
#include "simd/targets.h"

namespace raccgan {

struct MomentsArgs {
  int64_t m, c;
  Dtype dtype;  // float32 or bfloat16
  const void* x;
  const float* pivot;  // [C]
  float* partial;      // [pieces, 2, C], out: sums over a piece of d and d^2, d = x - pivot
};

// grad[m, c] = slope[c] (x[m, c] - centre[c]) + constant[c]: nothing cancels where x is far from zero.
struct AffineArgs {
  int64_t m, c;
  Dtype dtype;
  const void* x;
  const float *slope, *centre, *constant;  // [C] each
  void* grad;                              // [M, C], out
};

constexpr int64_t kMomentsPiece = 1024;  // pixels: what float32 adds up before float64 does; never by threads
static constexpr int64_t moments_pieces(int64_t m) { return rounded_up(m, kMomentsPiece) / kMomentsPiece; }

// A task is some channels of a piece, so that threads share a small batch of many channels too.
constexpr int64_t kMomentsChannels = 64;
static constexpr int64_t moments_tasks(int64_t m, int64_t c) {
  return moments_pieces(m) * (rounded_up(c, kMomentsChannels) / kMomentsChannels);
}

// `pivot` writes roughly the mean, from which `moments` then measures.
#define RACCGAN_DECLARE(target, unused)                                    \
  namespace target {                                                       \
  void pivot(const MomentsArgs& args, float* pivot);                       \
  void moments(const MomentsArgs& args, int64_t begin, int64_t end);       \
  void affine(const AffineArgs& args, int64_t begin, int64_t end);         \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE

}  // namespace raccgan
