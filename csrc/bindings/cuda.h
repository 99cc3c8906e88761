// What the CUDA bindings of several families use. A call is queued on PyTorch's current stream of its tensors' device,
// asks for memory from PyTorch's allocator alone and waits for nothing, so a CUDA graph can record it.
#pragma once

#include <bindings/on_device.h>

#include "common.h"

namespace raccgan {

// Float32 scratch memory of a call.
inline Tensor scratch_like(const Tensor& t, int64_t count) {
  return torch::stable::new_empty(t, {count}, ScalarType::Float);
}

inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": CUDA says: ", error);
}

}  // namespace raccgan
