// The element types of the kernels, on a CPU and on a GPU, and arithmetic of sizes: static, so that nothing is merged
// across targets. C headers only, see cpu/simd/targets.h.
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
RACCGAN_HOST_DEVICE static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
static constexpr int64_t rounded_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }
}  // namespace raccgan
