// The element types, and how they are loaded and stored: kernels compute in float32 whatever a tensor holds.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>
#include "../../ops/dtype.h"

namespace raccgan::cuda { namespace {
struct Float32 {
  using Stored = float;
  static __device__ float widen(float v) { return v; }
  static __device__ float narrow(float v) { return v; }
  static __device__ float unpack(unsigned word, int) { return __uint_as_float(word); }
  static __device__ unsigned pack(const float* v) { return __float_as_uint(*v); }
};

// Two elements in a word, the first one in the lower half.
template <class T> struct InHalves {
  using Stored = unsigned short;
  static __device__ unsigned short unpack(unsigned word, int i) { return static_cast<unsigned short>(word >> 16 * i); }
  static __device__ unsigned pack(const float* v) {
    return T::narrow(v[0]) | static_cast<unsigned>(T::narrow(v[1])) << 16;
  }
};

struct BFloat16 : InHalves<BFloat16> {
  static __device__ float widen(unsigned short v) { return __uint_as_float(static_cast<unsigned>(v) << 16); }
  // To nearest, ties to even. (cuda_bf16.h would take longer to compile than the kernels.)
  static __device__ unsigned short narrow(float v) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
  }
};

struct Float16 : InHalves<Float16> {
  static __device__ float widen(unsigned short v) { return __half2float(__ushort_as_half(v)); }
  static __device__ unsigned short narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
};

// Elements in a word, and in a 16-byte load.
template <class T> constexpr int kInWord = 4 / sizeof(typename T::Stored);
template <class T> constexpr int kVector = 4 * kInWord<T>;

// A 16-byte load or store: the address has to be a multiple of 16.
template <class T> __device__ const uint4* as_vector(const T* address) {
  return reinterpret_cast<const uint4*>(address);
}
template <class T> __device__ uint4* as_vector(T* address) { return reinterpret_cast<uint4*>(address); }

// V elements in memory: one, or a 16-byte load of them.
template <class T, int V> struct Packed {
  static_assert(V == kVector<T>);
  unsigned words[4];

  __device__ float operator[](int i) const { return T::widen(T::unpack(words[i / kInWord<T>], i % kInWord<T>)); }
};
template <class T> struct Packed<T, 1> {
  typename T::Stored element;

  __device__ float operator[](int) const { return T::widen(element); }
};

// The elements at `from`, which is aligned to their size.
template <class T, int V> __device__ Packed<T, V> fetch(const typename T::Stored* from) {
  if constexpr (V == 1) {
    return {*from};
  } else {
    const uint4 words = *as_vector(from);
    return {{words.x, words.y, words.z, words.w}};
  }
}

template <class T, int V> __device__ void widen(const Packed<T, V>& packed, float (&to)[V]) {
  for (int i = 0; i < V; ++i) to[i] = packed[i];
}

// V elements of a tensor of T, from element `at` on, which is aligned to their size.
template <class T, int V> __device__ void load(const void* tensor, int64_t at, float (&to)[V]) {
  widen<T>(fetch<T, V>(static_cast<const typename T::Stored*>(tensor) + at), to);
}

// Likewise, rounded. nvcc 13.0 would make four stores of an assignment of 16 bytes where it cannot prove that the
// address is a multiple of 16. The compiler may move loads across the store: no kernel reads what it has written so.
template <class T, int V> __device__ void store(void* tensor, int64_t at, const float (&from)[V]) {
  auto* const to = static_cast<typename T::Stored*>(tensor) + at;
  if constexpr (V == 1) {
    *to = T::narrow(from[0]);
  } else {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = T::pack(from + i * kInWord<T>);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3]));
  }
}

// Float32 by as many 16-byte loads as V elements take.
template <int V> __device__ void load_floats(const float* from, float (&to)[V]) {
  constexpr int kEach = V == 1 ? 1 : 4;
#pragma unroll
  for (int part = 0; part < V; part += kEach) {
    const auto loaded = fetch<Float32, kEach>(from + part);
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[part + i] = loaded[i];
  }
}

// The same into shared memory.
template <int V> __device__ void store_floats(float* to, const float (&from)[V]) {
  if constexpr (V == 1) {
    *to = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      *as_vector(to + i) = {__float_as_uint(from[i]), __float_as_uint(from[i + 1]), __float_as_uint(from[i + 2]),
                            __float_as_uint(from[i + 3])};
    }
  }
}

// The larger one, NaN where either is.
__device__ inline float larger(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// PyTorch's ReLU: NaN stays NaN.
__device__ inline float relu(float v) { return larger(v, 0.0f); }

// What a block shares beyond its __shared__ variables, of the size that the launch gives it; on a 16-byte boundary.
__device__ inline void* launched_shared() {
  extern __shared__ uint4 shared_by_launch[];
  return shared_by_launch;
}

// run(T{}) for the element type T of that name.
template <class Run> void for_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32: run(Float32{}); break;
    case Dtype::kBFloat16: run(BFloat16{}); break;
    case Dtype::kFloat16: run(Float16{}); break;
  }
}

// Whether all the tensors of that type allow 16-byte loads of every `run` elements; null is not a tensor.
template <class... Tensors> bool allow_vectors(Dtype dtype, int64_t run, const Tensors*... tensors) {
  return (reinterpret_cast<uintptr_t>(tensors) | ...) % 16 == 0 && run % (16 / size_of(dtype)) == 0;
}

template <int kNumber> using Constant = std::integral_constant<int, kNumber>;

// run(T{}, V) for the widest loads that all the tensors [..., C] of that type allow.
template <class Run, class... Tensors>
void for_vectors(Dtype dtype, int64_t channels, const Run& run, const Tensors*... tensors) {
  const bool wide = allow_vectors(dtype, channels, tensors...);
  for_dtype(dtype, [&](auto element) {
    wide ? run(element, Constant<kVector<decltype(element)>>{}) : run(element, Constant<1>{});
  });
}
}}  // namespace raccgan::cuda
