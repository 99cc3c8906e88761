// The CPU kernels of the depthwise convolution and its correlation, one set a target; see targets.h.
//
//     D(x, w)[n, c, h, w'] = sum over i,j   of w[c, i, j] x[n, c, h + i - k/2, w' + j - k/2]
//     C(x, g)[c, i, j]     = sum over n,h,w' of x[n, c, h + i - k/2, w' + j - k/2] g[n, c, h, w']
//
// Stride 1, zero padding k / 2, k of 3, 5 or 7. Everything is [N, H, W, C] in memory, without gaps.
#pragma once

#include "../dtype.h"
#include "targets.h"

namespace raccgan {

struct DepthwiseShape {
  int64_t n, c, h, w;
  int64_t k;
  Dtype dtype;  // float32 or bfloat16, of every tensor; sums are in float32
};

struct ConvolutionArgs {
  DepthwiseShape shape;
  const void* x;        // [N, H, W, C]
  const float* packed;  // the weights as pack_weights lays them out
  void* y;              // [N, H, W, C], out
};

struct CorrelationArgs {
  DepthwiseShape shape;
  const void* x;   // [N, H, W, C]
  const void* g;   // [N, H, W, C]
  float* partial;  // [pieces, k * k, C], out: the sums over each piece, see correlation_pieces
};

constexpr int64_t kMaxLanes = 16;      // of any target's vectors
constexpr int64_t kPiecePixels = 1024;  // a piece has about as many: see rows_a_piece and samples_a_piece
constexpr int64_t kLeastRows = 8;      // fewer would be lost among the k - 1 rows around them that are read too
constexpr int64_t kTile = 4;           // rows are filled up with zeros to a multiple of it

// static: nothing is merged across targets, see targets.h.
static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
static constexpr int64_t rounded_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// The image is cut into bands of rows, the batch into runs of samples, by the shape alone: never by threads or
// hardware, so that a sum over pieces is always the same sum. Few channels leave lanes of a vector free, which other
// samples of the run then fill.
static constexpr int64_t rows_a_piece(const DepthwiseShape& s) {
  return least(s.h, most(kLeastRows, kPiecePixels / s.w));
}
static constexpr int64_t samples_a_piece(const DepthwiseShape& s) {
  return most(s.c < kMaxLanes ? kMaxLanes : 1, kPiecePixels / (s.h * s.w));
}
static constexpr int64_t bands(const DepthwiseShape& s) { return rounded_up(s.h, rows_a_piece(s)) / rows_a_piece(s); }
static constexpr int64_t correlation_pieces(const DepthwiseShape& s) {
  return rounded_up(s.n, samples_a_piece(s)) / samples_a_piece(s) * bands(s);
}

// float32 that a thread needs beside the tensors, aligned to 64 bytes: a band of x with its surroundings, and of g.
static constexpr int64_t scratch_floats(const DepthwiseShape& s) {
  const int64_t width = rounded_up(s.w, kTile), rows = rows_a_piece(s);
  return kMaxLanes * ((rows + s.k - 1) * (width + s.k - 1) + rows * width + s.k * s.k);
}

// `tasks` counts the pieces of work of a call; each function does begin <= i < end of them, which a caller may split
// over threads as it likes. pack_weights reads w [C, 1, k, k] and b [C] or null, and writes packed_floats of them.
#define RACCGAN_DECLARE(target, unused)                                                                       \
  namespace target {                                                                                          \
  int64_t packed_floats(const DepthwiseShape& shape);                                                         \
  void pack_weights(const DepthwiseShape& shape, const void* w, const void* b, float* packed);                \
  int64_t convolution_tasks(const DepthwiseShape& shape);                                                     \
  void convolve(const ConvolutionArgs& args, float* scratch, int64_t begin, int64_t end);                     \
  int64_t correlation_tasks(const DepthwiseShape& shape);                                                     \
  void correlate(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end);                    \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE

}  // namespace raccgan
