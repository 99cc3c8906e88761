// The CUDA kernels of ops/moments.h, for their bindings: no CUDA header, so that any C++ compiler takes it.
#pragma once

#include "../ops/moments.h"

namespace raccgan::cuda {
// Float32 numbers of scratch memory that `moments` takes.
int64_t moments_floats(const MomentsArgs& args);

// Queues mean and biased variance over each group's pixels, [groups, C] each, on `stream` (a cudaStream_t) of `device`.
// Returns null, or CUDA's message if a launch failed. A group has at least one pixel.
const char* moments(const MomentsArgs& args, float* scratch, float* mean, float* var, int device, void* stream);

// Likewise the gradient of <grad_mean, mean> + <grad_var, var>, like x.
const char* moments_backward(const MomentsArgs& args, const float* grad_mean, const float* grad_var, const float* mean,
                             void* grad, int device, void* stream);
}  // namespace raccgan::cuda
