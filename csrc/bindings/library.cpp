// What is in this library, for raccgan.doctor and the tests. Each family's own bindings are beside this file.
#include <sstream>
#include <string>
#include <utility>
#include "../cpu/simd/targets.h"
#include "common.h"

namespace raccgan { namespace {
#ifndef RACCGAN_CUDA  // the toolkit's version
#define RACCGAN_CUDA ""
#define RACCGAN_CUDA_ARCHITECTURES ""
#endif
#ifndef RACCGAN_WHY_NO_CUDA
#define RACCGAN_WHY_NO_CUDA ""
#endif

std::string native_build() {
  std::ostringstream json;
  const char* separator = "";
  json << "{\"cpu_targets\": [";
#define RACCGAN_APPEND(target, unused) json << std::exchange(separator, ", ") << '"' << #target << '"';
  RACCGAN_FOR_EACH_TARGET(RACCGAN_APPEND, )
#undef RACCGAN_APPEND
  json << "], \"cpu_capability\": \"" << name_of(chosen_target()) << "\", \"cuda\": \"" << RACCGAN_CUDA
       << "\", \"cuda_architectures\": \"" << RACCGAN_CUDA_ARCHITECTURES << "\", \"why_no_cuda\": \""
       << RACCGAN_WHY_NO_CUDA << "\"}";
  return json.str();
}
}}  // namespace raccgan

STABLE_TORCH_LIBRARY(raccgan, m) {
  // JSON: cpu_targets and cpu_capability (the one in use), the CUDA toolkit's version or "", the GPU
  // architectures, and why there is no CUDA part or "".
  m.def("native_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CompositeExplicitAutograd, m) {
  m.impl("native_build", TORCH_BOX(&raccgan::native_build));
}
