// What the CUDA kernels use of CUDA beyond the language: wide loads and stores, rounding, launches.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace raccgan::cuda {
// A 16-byte load or store: the address has to be a multiple of 16.
template <class T> __device__ const uint4* as_vector(const T* address) {
  return reinterpret_cast<const uint4*>(address);
}
template <class T> __device__ uint4* as_vector(T* address) { return reinterpret_cast<uint4*>(address); }

// Writes 16 bytes of global memory at once. Of an assignment nvcc 13.0 makes four stores where it cannot prove that the
// address is a multiple of 16. The compiler may move loads across it: no kernel reads what it has written so.
__device__ inline void store_global(uint4* to, const uint4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w));
}

// The bits of the nearest bfloat16, ties to even. (cuda_bf16.h would take longer to compile than the kernels.)
__device__ inline unsigned short round_to_bfloat16(float v) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
  return bits;
}

// The larger one, NaN where either is.
__device__ inline float larger(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// What a block shares beyond its __shared__ variables, of the size that the launch gives it; on a 16-byte boundary.
__device__ inline void* launched_shared() {
  extern __shared__ uint4 shared_by_launch[];
  return shared_by_launch;
}
}  // namespace raccgan::cuda
