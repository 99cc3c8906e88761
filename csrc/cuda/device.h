// What the CUDA kernels are written against: the CUDA headers, or their emulation on a CPU for the tests.
#pragma once

#ifdef RACCGAN_EMULATION
#include "emulation.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace raccgan {
namespace cuda {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
}

}  // namespace cuda
}  // namespace raccgan

#endif
