// The CUDA kernels of ops/anomaly_score.h, for their bindings: no CUDA header, so that any C++ compiler takes it.
#pragma once

#include "../ops/anomaly_score.h"

namespace raccgan::cuda {
// Queues the score of n images on `stream` (a cudaStream_t) of `device`: residual [n] and feature [n], which are zero
// without features, and the map of `images`. Returns null, or CUDA's message if a launch failed.
const char* anomaly_score(int64_t n, const ImageArgs& images, const FeatureArgs* features, float* residual,
                          float* feature, int device, void* stream);
}  // namespace raccgan::cuda
