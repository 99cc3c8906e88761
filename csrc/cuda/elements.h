// The element types as the kernels read and write them: float32 inside, whatever a tensor holds.
#pragma once

#include "../dtype.h"
#include "device.h"

namespace raccgan {
namespace cuda {
namespace {

struct Float32 {
  using Stored = float;
  static __device__ float widen(float v) { return v; }
  static __device__ float narrow(float v) { return v; }
};

struct BFloat16 {
  using Stored = unsigned short;
  static __device__ float widen(unsigned short v) { return __uint_as_float(static_cast<unsigned>(v) << 16); }
  static __device__ unsigned short narrow(float v) { return round_to_bfloat16(v); }
};

struct Float16 {
  using Stored = unsigned short;
  static __device__ float widen(unsigned short v) { return __half2float(__ushort_as_half(v)); }
  static __device__ unsigned short narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
};

// Elements in a 16-byte load.
template <class T>
constexpr int kVector = 16 / sizeof(typename T::Stored);

// to[i] = from[i] in float32. One element, or as many as a 16-byte load has, `from` aligned to it.
template <class T, int V>
__device__ void load(const typename T::Stored* from, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = T::widen(*from);
  } else {
    static_assert(V == kVector<T>);
    union {
      uint4 vector;
      typename T::Stored elements[V];
    } raw;
    raw.vector = *as_vector(from);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = T::widen(raw.elements[i]);
  }
}

// to[i] = from[i], rounded; likewise.
template <class T, int V>
__device__ void store(typename T::Stored* to, const float (&from)[V]) {
  if constexpr (V == 1) {
    *to = T::narrow(from[0]);
  } else {
    static_assert(V == kVector<T>);
    union {
      uint4 vector;
      typename T::Stored elements[V];
    } raw;
#pragma unroll
    for (int i = 0; i < V; ++i) raw.elements[i] = T::narrow(from[i]);
    *as_vector(to) = raw.vector;
  }
}

// The same of float32, by as many 16-byte loads or stores as V elements take.
template <int V>
__device__ void load_floats(const float* from, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = *from;
  } else {
#pragma unroll
    for (int part = 0; part < V; part += 4) {
      float four[4];
      load<Float32, 4>(from + part, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[part + i] = four[i];
    }
  }
}

template <int V>
__device__ void store_floats(float* to, const float (&from)[V]) {
  if constexpr (V == 1) {
    *to = from[0];
  } else {
#pragma unroll
    for (int part = 0; part < V; part += 4) {
      const float four[4] = {from[part], from[part + 1], from[part + 2], from[part + 3]};
      store<Float32, 4>(to + part, four);
    }
  }
}

// run(T{}) for the element type T of that name.
template <class Run>
void for_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32: run(Float32{}); break;
    case Dtype::kBFloat16: run(BFloat16{}); break;
    case Dtype::kFloat16: run(Float16{}); break;
  }
}

template <int V>
struct Vector {
  static constexpr int width = V;
};

// run(T{}, Vector<V>{}) for the widest loads that all the tensors [..., C] of that type allow.
template <class Run, class... Tensors>
void for_vectors(Dtype dtype, int64_t channels, const Run& run, const Tensors*... tensors) {
  const auto addresses = (reinterpret_cast<uintptr_t>(tensors) | ...);
  for_dtype(dtype, [&](auto element) {
    constexpr int kWidest = kVector<decltype(element)>;
    if (addresses % 16 == 0 && channels % kWidest == 0) {
      run(element, Vector<kWidest>{});
    } else {
      run(element, Vector<1>{});
    }
  });
}

}  // namespace
}  // namespace cuda
}  // namespace raccgan
