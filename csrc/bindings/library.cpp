// What is in this library, for raccgan.doctor and the tests. Each family's own bindings are beside this file.
#include <sstream>
#include <string>
#include <utility>

#include "../cpu/simd/targets.h"
#include "common.h"

namespace raccgan {
namespace {

#ifdef RACCGAN_CUDA
constexpr const char* kCuda = RACCGAN_CUDA;  // the toolkit's version
constexpr const char* kCudaArchitectures = RACCGAN_CUDA_ARCHITECTURES;
#else
constexpr const char* kCuda = "";
constexpr const char* kCudaArchitectures = "";
#endif

std::string native_build() {
  std::ostringstream json;
  const char* separator = "";
  json << "{\"cpu_targets\": [";
#define RACCGAN_APPEND(target, unused) json << std::exchange(separator, ", ") << '"' << #target << '"';
  RACCGAN_FOR_EACH_TARGET(RACCGAN_APPEND, )
#undef RACCGAN_APPEND
  json << "], \"cpu_capability\": \"" << name_of(chosen_target()) << "\", \"cuda\": \"" << kCuda
       << "\", \"cuda_architectures\": \"" << kCudaArchitectures << "\"}";
  return json.str();
}

}  // namespace
}  // namespace raccgan

STABLE_TORCH_LIBRARY(raccgan, m) {
  // JSON: cpu_targets and cpu_capability (the one in use), the CUDA toolkit's version or "", the GPU architectures.
  m.def("native_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CompositeExplicitAutograd, m) {
  m.impl("native_build", TORCH_BOX(&raccgan::native_build));
}
