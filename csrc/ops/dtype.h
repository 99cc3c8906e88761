// The element types of the kernels, on a CPU and on a GPU. C headers only, see cpu/simd/targets.h.
#pragma once

#include <stdint.h>

// Code of ops/ that kernels on a GPU run too.
#ifdef __CUDACC__
#define RACCGAN_HOST_DEVICE __host__ __device__
#else
#define RACCGAN_HOST_DEVICE
#endif

namespace raccgan {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

static constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace raccgan
