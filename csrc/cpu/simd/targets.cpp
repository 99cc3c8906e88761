#include "targets.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace raccgan {
namespace {
#define RACCGAN_TARGET_OF(target, unused) Target::target,
constexpr Target kTargets[] = {RACCGAN_FOR_EACH_TARGET(RACCGAN_TARGET_OF, )};
#undef RACCGAN_TARGET_OF

// Asks the processor and, through it, whether the operating system saves the wide registers.
bool runs_here(Target target) {
#ifdef RACCGAN_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (target == Target::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (target == Target::avx512) return avx512;
  if (target == Target::avx512bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return target == Target::portable;
}

Target choose() {
  const char* cap = std::getenv("RACCGAN_CPU_CAPABILITY");
  const bool capped = cap != nullptr && *cap != '\0';
  Target best = Target::portable;
  for (const Target target : kTargets) {
    if (runs_here(target)) best = target;
    if (capped && std::strcmp(cap, name_of(target)) == 0) return best;
  }
  if (!capped) return best;
  std::string message = std::string("RACCGAN_CPU_CAPABILITY=") + cap + " is none of";
  for (const Target target : kTargets) message += std::string(" ") + name_of(target);
  throw std::runtime_error(message);
}
}  // namespace

Target chosen_target() {
  static const Target chosen = choose();
  return chosen;
}

const char* name_of(Target target) {
#define RACCGAN_NAME(name, unused) \
  if (target == Target::name) return #name;
  RACCGAN_FOR_EACH_TARGET(RACCGAN_NAME, )
#undef RACCGAN_NAME
  return "unknown";
}
}  // namespace raccgan
