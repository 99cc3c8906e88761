// The CUDA kernels of the moments of each channel, for their bindings: no CUDA header, so that any C++ compiler takes it.
#pragma once

#include <stdint.h>

#include "../ops/dtype.h"

namespace raccgan {
namespace cuda {

// Runs of pixels, [runs, pixels, C] without gaps. A batch norm is one run, an instance norm one a sample.
struct Runs {
  int64_t runs, pixels, channels;
  Dtype dtype;
  const void* x;
  bool rectify;  // whether the moments are of relu(x)
};

// Float32 numbers of scratch memory that `moments` takes.
int64_t moments_floats(const Runs& of);

// Queues mean and biased variance over each run's pixels, [runs, C] each, on `stream` (a cudaStream_t) of `device`.
// Returns null, or CUDA's message if a launch failed. There has to be a pixel.
const char* moments(const Runs& of, float* scratch, float* mean, float* var, int device, void* stream);

// Likewise the gradient of <grad_mean, mean> + <grad_var, var>, like x.
const char* moments_backward(const Runs& of, const float* grad_mean, const float* grad_var, const float* mean,
                             void* grad, int device, void* stream);

}  // namespace cuda
}  // namespace raccgan
