// Vectors of float32 of the target's natural width, and loads that widen bfloat16 and float16 to them.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace raccgan { namespace {
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kWidth = kBytes / 4;  // float32 in a vector
constexpr int64_t kMostLanes = 16;  // of any target's vectors: what must not depend on the target
constexpr bool kManyRegisters = kBytes == 64;  // 32 of them, otherwise 16

typedef float Floats __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

inline Floats load(const float* from) {
  Floats v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }

// a * b + c, rounded once where the target has the instruction. The compiler fuses nothing of its own accord
// (-ffp-contract=off), so what uses this says that its bits may differ from target to target.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// kWidth 16-bit words, each in the lower half of a 32-bit one.
inline Words load_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Halves v;
  memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Words);
#endif
}

// An element type: how it is stored, and how kWidth of them become float32 (and back, where a kernel writes it).
struct Float32 {
  using Stored = float;
  static Floats load(const float* from) { return raccgan::load(from); }
  static void store(float* to, Floats v) { raccgan::store(to, v); }
};

struct BFloat16 {
  using Stored = uint16_t;
  // bfloat16 is the upper half of a float32.
  static Floats load(const uint16_t* from) { return (Floats)(load_halves(from) << 16); }
  // In the lower half of a word. To the nearest, ties to even; a NaN stays one: rounding could carry its bits into
  // infinity.
  static Words rounded(Floats v) {
    const Words bits = (Words)v;
    const Words nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words nan = (Words)(v != v);
    return (nearest & ~nan) | ((bits >> 16 | 0x40) & nan);
  }
  // The processor's own instruction makes zeros of subnormal numbers.
  static void store(uint16_t* to, Floats v) {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
    const Halves halves = __builtin_convertvector(rounded(v), Halves);
#endif
    memcpy(to, &halves, sizeof halves);
  }
};

// The function for tensors of that dtype, of a template by element type.
#define RACCGAN_OF_DTYPE(dtype, function) ((dtype) == Dtype::kFloat32 ? function<Float32> : function<BFloat16>)

struct Float16 {
  using Stored = uint16_t;
  static Floats load(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    // Exponent and fraction move to their float32 places; times 2^112 corrects the exponent's bias and normalises
    // the subnormal numbers. Infinity and NaN, whose exponent is all ones, get float32's.
    const Words half = load_halves(from);
    const Words magnitude = (half & 0x7fff) << 13;
    const Words scaled = (Words)((Floats)magnitude * 0x1p112f);
    const Words special = (Words)(magnitude >= 0x0f800000) & 0x7f800000;
    return (Floats)(scaled | special | (half & 0x8000) << 16);
#endif
  }
};
}}  // namespace raccgan
