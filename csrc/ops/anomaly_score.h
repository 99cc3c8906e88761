// The arguments of the anomaly-score kernels, on a CPU and on a GPU. C headers only, see cpu/simd/targets.h.
//
//     residual[n]  = mean over c,h,w of (a - b)^2      map[n, h, w] = mean over c of (a - b)^2
#pragma once

#include "dtype.h"

namespace raccgan {
// Two tensors of one dtype, compared sample by sample. A sample is dense, with its elements in the same order in both
// tensors; the samples themselves may lie anywhere.
struct ComparedTensors {
  const void *a, *b;
  int64_t stride_a, stride_b;  // elements from one sample to the next
  Dtype dtype;
};

// Images [N, C, H, W] with pixels = H * W; an image is [C, pixels] in memory, or [pixels, C] when channels_last.
struct ImageArgs {
  ComparedTensors images;
  int64_t channels;
  int64_t pixels;
  bool channels_last;
  float* map;       // [N, pixels], or null when not needed
  double* partial;  // [N, chunks], out, on a GPU: the sum of (a - b)^2 over each chunk of an image
};

// Features [N, ...] with `elements` elements a sample.
struct FeatureArgs {
  ComparedTensors features;
  int64_t elements;
  double* partial;  // likewise
};

// Chunks of a sample. Their size depends neither on batch nor on threads: a sample's sum is always the same tree of
// additions.
constexpr int64_t kImageChunk = 1024;  // pixels: a chunk's sums (4 KiB of float32) stay in the first-level cache
constexpr int64_t kFeatureChunk = 16384;  // elements

// Channels of a channels_last image for the CPU kernels, whose buffer holds at least one pixel.
constexpr int64_t kMostChannelsLast = 4096;
RACCGAN_HOST_DEVICE static constexpr int64_t chunks(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }
}  // namespace raccgan
