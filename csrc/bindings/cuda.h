// What the CUDA bindings of several families use. A call is queued on PyTorch's current stream of its tensors' device,
// asks for memory from PyTorch's allocator alone and waits for nothing, so a CUDA graph can record it.
#pragma once

#include <bindings/on_device.h>
#include "common.h"

namespace raccgan {
inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": CUDA says: ", error);
}

template <class Args>
void queue_pass(const OnDevice& device, const Tensor& x, const char* op, const Args& args,
                int64_t (*scratch_floats)(const Args&), const char* (*pass)(const Args&, float*, int, void*)) {
  const Tensor scratch = new_floats(x, {scratch_floats(args)});
  check_launch(pass(args, scratch.mutable_data_ptr<float>(), device.index(), device.stream()), op);
}
}  // namespace raccgan
