// The arguments of the kernels of each channel's moments over groups of pixels, on a CPU and on a GPU. C headers only,
// see cpu/simd/targets.h.
//
//     mean[c] = mean of x[., c],   var[c] = mean of (x[., c] - mean[c])^2
#pragma once

#include "dtype.h"

namespace raccgan {
// x [groups, pixels, C] without gaps: a batch norm has one group, an instance norm one a sample.
struct MomentsArgs {
  int64_t groups, pixels, channels;
  Dtype dtype;
  const void* x;
  bool relu;  // whether the moments are of relu(x)
};
}  // namespace raccgan
