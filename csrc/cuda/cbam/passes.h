// The CUDA passes of CBAM, for their bindings: no CUDA header, so that any C++ compiler takes it.
#pragma once

#include "../../ops/cbam.h"

namespace raccgan::cuda {
// Each queues one pass on `stream` (a cudaStream_t) of `device`, with so many float32 numbers of scratch memory as
// its _floats says, and returns null, or CUDA's message if a launch failed.
int64_t cbam_forward_floats(const CbamForwardArgs& args);
const char* cbam_forward(const CbamForwardArgs& args, float* scratch, int device, void* stream);

int64_t cbam_backward_floats(const CbamBackwardArgs& args);
const char* cbam_backward(const CbamBackwardArgs& args, float* scratch, int device, void* stream);
}  // namespace raccgan::cuda
