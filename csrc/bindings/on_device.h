// Where a CUDA binding's call runs: for which dispatch key it is registered, on which device and stream. The header is
// included by its path in csrc/, so that a build which puts another one first runs the same bindings elsewhere.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include "common.h"

#define RACCGAN_CUDA_KEY CUDA

namespace raccgan {
// The stream on which PyTorch queues work for that device. Only libtorch_cuda has the function; it is looked up in
// the copy that PyTorch has loaded, so that this library links and loads without it, and whatever PyTorch it was
// built against.
inline void* current_cuda_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "PyTorch's CUDA library is not loaded in this process");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "PyTorch did not name its current CUDA stream");
  return stream;
}

// Makes a tensor's device the current one, for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : index_(checked(t).get_device_index()), guard_(index_) {}
  int index() const { return index_; }
  void* stream() const { return current_cuda_stream(index_); }

 private:
  // A call comes here for any tensor of it.
  static const Tensor& checked(const Tensor& t) {
    STD_TORCH_CHECK(t.is_cuda(), "x and the other tensors must be on one device");
    return t;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
}  // namespace raccgan
