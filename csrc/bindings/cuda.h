// What the CUDA bindings of several families use. A call is queued on PyTorch's current stream of its tensors' device,
// asks for memory from PyTorch's allocator alone and waits for nothing, so a CUDA graph can record it.
#pragma once

#include "common.h"

#ifdef RACCGAN_EMULATION
// The kernels run on the CPU (cuda/emulation.h), and so do their bindings: for CPU tensors, in the CPU kernels' place.
#define RACCGAN_CUDA_KEY CPU
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define RACCGAN_CUDA_KEY CUDA
#endif

namespace raccgan {

#ifdef RACCGAN_EMULATION

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  int index() const { return 0; }
  void* stream() const { return nullptr; }
};

#else

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

#endif

// Float32 scratch memory of a call.
inline Tensor scratch_like(const Tensor& t, int64_t count) {
  return torch::stable::new_empty(t, {count}, ScalarType::Float);
}

inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, op, ": CUDA says: ", error);
}

}  // namespace raccgan
