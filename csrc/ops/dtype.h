// The element types that the kernels take, the same for CPU and CUDA. C headers only, see cpu/targets.h.
#pragma once

#include <stdint.h>

namespace raccgan {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

static constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace raccgan
