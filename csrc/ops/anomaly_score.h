// What the bindings hand to the anomaly-score kernels, the same for CPU and CUDA.
//
//     residual[n]  = mean over c,h,w of (a - b)^2      map[n, h, w] = mean over c of (a - b)^2
//
// C headers only: this file is part of every per-target translation unit (see cpu/targets.h).
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace raccgan {

// Two tensors of one dtype, compared sample by sample. A sample is one dense run of elements in the same order in
// both; the samples themselves may lie anywhere.
struct Pair {
  const void* a;
  const void* b;
  int64_t stride_a;  // elements from one sample to the next
  int64_t stride_b;
  Dtype dtype;
};

// Images [N, C, H, W] with pixels = H * W; an image is [C, pixels] in memory, or [pixels, C] when channels_last.
struct ImageArgs {
  Pair images;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
  float* map;       // [N, pixels], or null when not wanted
  double* partial;  // [N, pieces], out: the sum of (a - b)^2 over each piece of an image
};

// Features [N, ...] with `elements` elements a sample.
struct FeatureArgs {
  Pair features;
  int64_t elements;
  double* partial;  // [N, pieces], out: the sum of (a - b)^2 over each piece of a sample
};

// A sample of `size` is cut into pieces of `piece`: fixed by the size alone, never by batch, threads or hardware, so
// that a sample's sum is always the same tree of additions.
#ifdef __CUDACC__
__host__ __device__
#endif
constexpr int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

}  // namespace raccgan
