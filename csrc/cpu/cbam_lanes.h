// Vectors of channels and of pixels: what the forward and the backward kernels of CBAM share.
//
// Included by the per-target sources only. Everything here is in an anonymous namespace, for the reason in targets.h.
#pragma once

#include "cbam.h"
#include "vector.h"

#define RACCGAN_INLINE __attribute__((always_inline))

namespace raccgan {
namespace {

static_assert(kWidth <= kCbamLanes);

constexpr int kPixels = 4;  // at a time: they share what is loaded by channel, and their sums need not wait
static_assert(kWidth % kPixels == 0);

// How many elements ahead tensors are fetched: the processor's own prefetcher starts anew on every page. Where x is in
// memory, pooling it takes 0.6 of the time with that.
constexpr int64_t kAhead = 1024;

inline Floats all(float value) { return value - Floats{}; }

inline Floats select(Words where, Floats a, Floats b) { return where ? a : b; }

// b where either is NaN, as the instruction has it.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select((Words)(a > b), a, b);
#endif
}

inline Words first_lanes(int64_t count) {
  Words lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return (Words)(lane < static_cast<uint32_t>(count));
}

// ---- whole vectors, and the rest of a run that does not fill one --------------------------------------------------

struct Whole {
  template <class T>
  Floats load(const typename T::Stored* from) const {
    return T::load(from);
  }
  template <class T>
  void store(typename T::Stored* to, Floats v) const {
    T::store(to, v);
  }
  // v, and `other` in lanes that hold nothing.
  Floats keep(Floats v, Floats other) const { return v; }
};

// Reads zeros where there is nothing, and writes nothing there.
struct Rest {
  int64_t count;

  template <class T>
  Floats load(const typename T::Stored* from) const {
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

  template <class T>
  void store(typename T::Stored* to, Floats v) const {
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

  Floats keep(Floats v, Floats other) const { return select(first_lanes(count), v, other); }
};

// use(lanes, at) for the elements at, at + 1, ... of `count`, a vector at a time.
template <class Use>
inline RACCGAN_INLINE void for_lanes(int64_t count, const Use& use) {
  int64_t at = 0;
  for (; at + kWidth <= count; at += kWidth) use(Whole{}, at);
  if (at < count) use(Rest{count - at}, at);
}

template <int N>
struct Pixels {
  static constexpr int count = N;
};

// use(p, pixels) for kPixels pixels at a time, then for one at a time.
template <class Use>
inline RACCGAN_INLINE void for_pixels(int64_t first, int64_t last, const Use& use) {
  int64_t p = first;
  for (; p + kPixels <= last; p += kPixels) use(p, Pixels<kPixels>{});
  for (; p < last; ++p) use(p, Pixels<1>{});
}

// ---- lanes among each other ---------------------------------------------------------------------------------------

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using Type = Indices<I...>;
};
using Lane = MakeIndices<kWidth>::Type;

#if defined(__clang__)
#define RACCGAN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RACCGAN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Of the blocks of kBlock lanes in a, then b: the even ones, or the odd ones.
template <int kBlock, int kOdd, int... I>
Floats blocks(Floats a, Floats b, Indices<I...>) {
  return RACCGAN_SHUFFLE(a, b, ((I / kBlock * 2 + kOdd) * kBlock + I % kBlock)...);
}

// Lane by lane from the lower halves of a and b in turn, or from the upper halves.
template <int kUpper, int... I>
Floats interleaved(Floats a, Floats b, Indices<I...>) {
  return RACCGAN_SHUFFLE(a, b, (I / 2 + kUpper * kWidth / 2 + I % 2 * kWidth)...);
}

// Lane i of the result is all lanes of v[i] joined by `join`, in pairs. Overwrites v.
template <int kBlock = kWidth / 2, class Join>
inline RACCGAN_INLINE Floats joined(Floats* v, const Join& join) {
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

inline Floats sums_of(Floats* v) {
  return joined(v, [](Floats a, Floats b) RACCGAN_INLINE { return a + b; });
}
inline Floats maxima_of(Floats* v) { return joined(v, larger); }

inline void transpose(Floats (&v)[kWidth]) {
#pragma GCC unroll 4
  for (int round = kWidth; round > 1; round /= 2) {
    Floats next[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = interleaved<0>(v[i], v[i + kWidth / 2], Lane{});
      next[2 * i + 1] = interleaved<1>(v[i], v[i + kWidth / 2], Lane{});
    }
    memcpy(v, next, sizeof next);
  }
}

typedef double Doubles __attribute__((vector_size(2 * kBytes)));

inline Doubles widened(Floats v) { return __builtin_convertvector(v, Doubles); }
inline Floats narrowed(Doubles v) { return __builtin_convertvector(v, Floats); }

inline double sum_of_lanes(Floats v) {
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

// ---- functions ----------------------------------------------------------------------------------------------------

// e^x by 2^n e^r with |r| <= log(2) / 2 and a polynomial for e^r, to about one unit in the last place.
inline Floats exponential(Floats x) {
  typedef int32_t Integers __attribute__((vector_size(kBytes)));
  const Floats bounded = select((Words)(x > 88.0f), all(88.0f), select((Words)(x < -87.0f), all(-87.0f), x));
  const Floats shifted = multiply_add(bounded, all(0x1.715476p+0f), all(0x1.8p23f));  // its low bits are round(x/log 2)
  const Floats n = shifted - 0x1.8p23f;
  Floats r = multiply_add(n, all(-0x1.62e400p-1f), bounded);
  r = multiply_add(n, all(-0x1.7f7d1cp-20f), r);
  Floats e = all(0x1.6850e4p-10f);
  e = multiply_add(e, r, all(0x1.123bccp-7f));
  e = multiply_add(e, r, all(0x1.555b98p-5f));
  e = multiply_add(e, r, all(0x1.55548ep-3f));
  e = multiply_add(e, r, all(0x1.fffff8p-2f));
  e = multiply_add(e, r, all(1.0f));
  e = multiply_add(e, r, all(1.0f));
  return (Floats)((Integers)e + (((Integers)shifted) << 23));
}

// NaN for NaN.
inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + select((Words)(x == x), exponential(-x), x)); }

// How a sample's scores become the spatial gate: sigmoid(scale * score + shift).
struct SpatialGate {
  float scale, shift;

  SpatialGate(const CbamWeights& weights, const float* moments)
      : scale(weights.norm_weight / __builtin_sqrtf(moments[1] + weights.eps)),
        shift(weights.norm_bias - moments[0] * scale) {}

  Floats operator()(Floats scores) const { return sigmoid(scores * scale + shift); }

  // Of `count` scores, into memory that may be written up to a whole vector.
  void of(const float* scores, int64_t count, float* gates) const {
    for_lanes(count, [&](auto lanes, int64_t at) RACCGAN_INLINE {
      lanes.template store<Float32>(gates + at, (*this)(lanes.template load<Float32>(scores + at)));
    });
  }
};

// use(lanes, at, result) with result[i] = sum over j of matrix[at + i, j] vector[j], for `rows` rows.
template <class Use>
void matrix_product(const float* matrix, const float* vector, int64_t rows, int64_t columns, const Use& use) {
  for_lanes(rows, [&](auto lanes, int64_t at) RACCGAN_INLINE {
    const int64_t here = least(kWidth, rows - at);
    Floats sums[kWidth] = {};
    for (int64_t i = 0; i < here; ++i) {
      const float* const row = matrix + (at + i) * columns;
      Floats sum{};
      for_lanes(columns, [&](auto part, int64_t j) RACCGAN_INLINE {
        sum = multiply_add(part.template load<Float32>(row + j), part.template load<Float32>(vector + j), sum);
      });
      sums[i] = sum;
    }
    use(lanes, at, sums_of(sums));
  });
}

// One piece of a sample.
struct Piece {
  int64_t sample, first, last;  // pixels

  Piece(const CbamShape& s, int64_t task)
      : sample(task / pieces(s)),
        first(task % pieces(s) * pixels_a_piece(s)),
        last(least(s.h * s.w, first + pixels_a_piece(s))) {}

  int64_t count() const { return last - first; }
  template <class T>
  const typename T::Stored* of(const CbamShape& s, const CbamSamples& samples) const {
    return static_cast<const typename T::Stored*>(samples.data) + in_tensor(s) - samples.first * s.h * s.w * s.c;
  }
  // Where the piece begins in a tensor [N, P, C], and in one [N, P].
  int64_t in_tensor(const CbamShape& s) const { return in_plane(s) * s.c; }
  int64_t in_plane(const CbamShape& s) const { return sample * s.h * s.w + first; }
};

}  // namespace
}  // namespace raccgan
