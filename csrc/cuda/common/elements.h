// The element types: kernels compute in float32 whatever a tensor holds.
#pragma once

#include "../../ops/dtype.h"
#include "device.h"

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
  static __device__ unsigned short unpack(unsigned word, int i) { return static_cast<unsigned short>(word >> 16 * i); }
  static __device__ unsigned pack(const float* v) {
    return T::narrow(v[0]) | static_cast<unsigned>(T::narrow(v[1])) << 16;
  }
};

struct BFloat16 : InHalves<BFloat16> {
  using Stored = unsigned short;
  static __device__ float widen(unsigned short v) { return __uint_as_float(static_cast<unsigned>(v) << 16); }
  static __device__ unsigned short narrow(float v) { return round_to_bfloat16(v); }
};

struct Float16 : InHalves<Float16> {
  using Stored = unsigned short;
  static __device__ float widen(unsigned short v) { return __half2float(__ushort_as_half(v)); }
  static __device__ unsigned short narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
};

// Elements in a 16-byte load.
template <class T> constexpr int kVector = 16 / sizeof(typename T::Stored);

// V elements in memory: one, or a 16-byte load of them, in words of one or two.
template <class T, int V> struct Packed {
  static_assert(V == kVector<T>);
  static constexpr int kElements = 4 / sizeof(typename T::Stored);  // a word
  unsigned words[4];

  __device__ float operator[](int i) const { return T::widen(T::unpack(words[i / kElements], i % kElements)); }
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

template <class T, int V> __device__ void put(typename T::Stored* to, const Packed<T, V>& packed) {
  if constexpr (V == 1) {
    *to = packed.element;
  } else {
    store_global(as_vector(to), {packed.words[0], packed.words[1], packed.words[2], packed.words[3]});
  }
}

template <class T, int V> __device__ void widen(const Packed<T, V>& packed, float (&to)[V]) {
  for (int i = 0; i < V; ++i) to[i] = packed[i];
}

template <class T, int V> __device__ Packed<T, V> narrow(const float (&from)[V]) {
  Packed<T, V> packed;
  if constexpr (V == 1) {
    packed.element = T::narrow(from[0]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.words[i] = T::pack(from + i * packed.kElements);
  }
  return packed;
}

// to[i] = from[i] in float32, likewise.
template <class T, int V> __device__ void load(const typename T::Stored* from, float (&to)[V]) {
  widen<T>(fetch<T, V>(from), to);
}

// to[i] = from[i], rounded; likewise.
template <class T, int V> __device__ void store(typename T::Stored* to, const float (&from)[V]) {
  put<T, V>(to, narrow<T, V>(from));
}

// The same of float32, by as many 16-byte loads or stores as V elements take.
template <int V> __device__ void load_floats(const float* from, float (&to)[V]) {
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

// Into shared memory.
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

// run(T{}) for the element type T of that name.
template <class Run> void for_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32: run(Float32{}); break;
    case Dtype::kBFloat16: run(BFloat16{}); break;
    case Dtype::kFloat16: run(Float16{}); break;
  }
}

template <int V> struct Vector {
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
}}  // namespace raccgan::cuda
