// What the CUDA kernels are written against: the CUDA headers, or their emulation on a CPU for the tests.
#pragma once

#ifdef RACCGAN_EMULATION
#include "emulation.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace raccgan {
namespace cuda {

// A 16-byte load or store: the address has to be a multiple of 16.
template <class T>
__device__ const uint4* as_vector(const T* address) {
  return reinterpret_cast<const uint4*>(address);
}
template <class T>
__device__ uint4* as_vector(T* address) {
  return reinterpret_cast<uint4*>(address);
}

// The bits of the nearest bfloat16, ties to even. (cuda_bf16.h would take longer to compile than the kernels.)
__device__ inline unsigned short round_to_bfloat16(float v) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

// What a block shares beyond its __shared__ variables, of the size that the launch gives it; on a 16-byte boundary.
__device__ inline void* launched_shared() {
  extern __shared__ uint4 shared_by_launch[];
  return shared_by_launch;
}

// `shared`: bytes of launched_shared().
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared > 0) {
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, limit, shared); error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
}

}  // namespace cuda
}  // namespace raccgan

#endif
