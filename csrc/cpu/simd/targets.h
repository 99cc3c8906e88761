// Which processors the CPU kernels are compiled for, and which of them this machine runs.
//
// Every kernel source of this folder is compiled once a target, with that target's compiler flags (setup.py), and
// puts its functions into the namespace RACCGAN_TARGET. Such a source includes C headers only and keeps its helpers,
// those in headers too, in an anonymous namespace: an inline function with external linkage, from the standard library
// say, would be merged by the linker across targets, and the portable path could end up running another target's code.
#pragma once

// DO(target, argument) for each target, from the plainest to the best.
#ifdef RACCGAN_X86
#define RACCGAN_FOR_EACH_TARGET(DO, argument) \
  DO(portable, argument) DO(avx2, argument) DO(avx512, argument) DO(avx512bf16, argument)
#else
#define RACCGAN_FOR_EACH_TARGET(DO, argument) DO(portable, argument)
#endif

namespace raccgan {
#define RACCGAN_ENUMERATOR(target, unused) target,
enum class Target { RACCGAN_FOR_EACH_TARGET(RACCGAN_ENUMERATOR, ) };
#undef RACCGAN_ENUMERATOR

// The best target that this processor runs, capped by the environment variable RACCGAN_CPU_CAPABILITY (a target's
// name) where that is set. Decided once, at the first call. Throws std::runtime_error if the variable names no target.
Target chosen_target();

const char* name_of(Target target);
}  // namespace raccgan

// The chosen target's function of that name, as in RACCGAN_SELECT(cbam_forward)(args).
#define RACCGAN_CASE(target, function) \
  case ::raccgan::Target::target: return &::raccgan::target::function;
#define RACCGAN_SELECT(function)                                                            \
  ([] {                                                                                     \
    switch (::raccgan::chosen_target()) { RACCGAN_FOR_EACH_TARGET(RACCGAN_CASE, function) } \
    return &::raccgan::portable::function;                                                  \
  }())
