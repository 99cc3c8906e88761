// Vectors along a run of numbers, the rest of it that fills none, and the lanes of vectors among each other.
#pragma once

#include "vector.h"

#define RACCGAN_INLINE __attribute__((always_inline))

namespace raccgan { namespace {
template <int N> struct Count {
  static constexpr int count = N;
};

inline Floats all(float value) { return value - Floats{}; }

inline Floats select(Words where, Floats a, Floats b) { return where ? a : b; }

inline Words first_lanes(int64_t count) {
  Words lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return (Words)(lane < static_cast<uint32_t>(count));
}

// Lanes of a run of numbers: load<T> and store<T> take elements of type T, load and store take float32.
struct Whole {
  int64_t size() const { return kWidth; }
  template <class T> Floats load(const typename T::Stored* from) const { return T::load(from); }
  template <class T> void store(typename T::Stored* to, Floats v) const { T::store(to, v); }
  RACCGAN_INLINE Floats load(const float* from) const { return raccgan::load(from); }
  RACCGAN_INLINE void store(float* to, Floats v) const { raccgan::store(to, v); }
  // v, and `other` in lanes that hold nothing.
  Floats keep(Floats v, Floats other) const { return v; }
};

// Reads zeros where there is nothing, and writes nothing there.
struct Rest {
  int64_t count;

  int64_t size() const { return count; }
  template <class T> Floats load(const typename T::Stored* from) const {
    typename T::Stored lanes[kWidth] = {};
#if defined(__AVX512F__)
    const uint16_t mask = (1u << count) - 1;
    if constexpr (sizeof *from == 4) {
      _mm512_storeu_ps(lanes, _mm512_maskz_loadu_ps(mask, from));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(mask, from));
    }
#else
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
#endif
    return T::load(lanes);
  }

  template <class T> void store(typename T::Stored* to, Floats v) const {
    typename T::Stored lanes[kWidth];
    T::store(lanes, v);
#if defined(__AVX512F__)
    const uint16_t mask = (1u << count) - 1;
    if constexpr (sizeof *to == 4) {
      _mm512_mask_storeu_ps(to, mask, _mm512_loadu_ps(lanes));
    } else {
      _mm256_mask_storeu_epi16(to, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
    }
#else
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
  }

  RACCGAN_INLINE Floats load(const float* from) const { return load<Float32>(from); }
  RACCGAN_INLINE void store(float* to, Floats v) const { store<Float32>(to, v); }
  Floats keep(Floats v, Floats other) const { return select(first_lanes(count), v, other); }
};

// use(lanes, at) for the elements at, at + 1, ... of `count`, a vector at a time.
template <class Use> inline RACCGAN_INLINE void for_lanes(int64_t count, const Use& use) {
  int64_t at = 0;
  for (; at + kWidth <= count; at += kWidth) use(Whole{}, at);
  if (at < count) use(Rest{count - at}, at);
}

// use(lanes, vector) for the vectors that `count` elements fill or begin, kVectors at most.
template <int kVectors, class Use> inline RACCGAN_INLINE void for_vectors(int64_t count, const Use& use) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = count - v * kWidth;
    if (left >= kWidth) {
      use(Whole{}, v);
    } else if (left > 0) {
      use(Rest{left}, v);
    }
  }
}

typedef double Doubles __attribute__((vector_size(2 * kBytes)));

inline Doubles widened(Floats v) { return __builtin_convertvector(v, Doubles); }
inline Floats narrowed(Doubles v) { return __builtin_convertvector(v, Floats); }

template <class Vector> double sum_of_lanes(Vector v) {
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

// to[i] = partial[0, i] + partial[1, i] + ..., in float64 and in that order.
inline void add_up(const float* partial, int64_t count, int64_t size, float* to) {
  for_lanes(size, [&](auto lanes, int64_t i) RACCGAN_INLINE {
    Doubles sum{};
    for (int64_t j = 0; j < count; ++j) sum += widened(lanes.load(partial + j * size + i));
    lanes.store(to + i, narrowed(sum));
  });
}

template <int... I> struct Indices {};
template <int N, int... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct MakeIndices<0, I...> {
  using Type = Indices<I...>;
};
using Lane = MakeIndices<kWidth>::Type;

#if defined(__clang__)
#define RACCGAN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RACCGAN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Of the blocks of kBlock lanes in a, then b: the even ones, or the odd ones.
template <int kBlock, int kOdd, int... I> Floats blocks(Floats a, Floats b, Indices<I...>) {
  return RACCGAN_SHUFFLE(a, b, ((I / kBlock * 2 + kOdd) * kBlock + I % kBlock)...);
}

// Lane by lane from the lower halves of a and b in turn, or from the upper halves.
template <int kUpper, int... I> Floats interleaved(Floats a, Floats b, Indices<I...>) {
  return RACCGAN_SHUFFLE(a, b, (I / 2 + kUpper * kWidth / 2 + I % 2 * kWidth)...);
}

// Lane i of the result is all lanes of v[i] joined by `join`, in pairs. Overwrites v.
template <int kBlock = kWidth / 2, class Join> inline RACCGAN_INLINE Floats joined(Floats* v, const Join& join) {
  if constexpr (kBlock == 0) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) {
      const Floats a = v[2 * i], b = v[2 * i + 1];
      v[i] = join(blocks<kBlock, 0>(a, b, Lane{}), blocks<kBlock, 1>(a, b, Lane{}));
    }
    return joined<kBlock / 2>(v, join);
  }
}

// v[0][0], v[1][0], ... v[kCount - 1][0], v[0][1], ...: of as many vectors as one has lanes, the transpose.
template <int kCount> inline RACCGAN_INLINE void interleave(Floats (&v)[kCount]) {
#pragma GCC unroll 4
  for (int round = kCount; round > 1; round /= 2) {
    Floats next[kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = interleaved<0>(v[i], v[i + kCount / 2], Lane{});
      next[2 * i + 1] = interleaved<1>(v[i], v[i + kCount / 2], Lane{});
    }
    memcpy(v, next, sizeof next);
  }
}

inline void transpose(Floats (&v)[kWidth]) { interleave(v); }
}}  // namespace raccgan
