// In the place of csrc/bindings/on_device.h, which an include path finds after this one: the CUDA bindings serve CPU
// tensors in the CPU kernels' place, and their launches go to the PTX machine, which runs one after the other.
#pragma once

#include <bindings/common.h>

#define RACCGAN_CUDA_KEY CPU

namespace raccgan {

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  int index() const { return 0; }
  void* stream() const { return nullptr; }
};

}  // namespace raccgan
