// Vectors of channels and of pixels: what the forward and the backward kernels of CBAM share.
#pragma once

#include "../simd/runs.h"
#include "kernels.h"

namespace raccgan { namespace {
static_assert(kWidth <= kCbamLanes);

constexpr int kPixels = 4;  // at a time: they share what is loaded by channel, and their sums need not wait
static_assert(kWidth % kPixels == 0);

// How many elements ahead tensors are fetched: the processor's own prefetcher starts anew on every page. Where x is in
// memory, pooling it takes 0.6 of the time with that.
constexpr int64_t kAhead = 1024;

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

// use(p, pixels) for kPixels pixels at a time, then for one at a time.
template <class Use> inline RACCGAN_INLINE void for_pixels(int64_t first, int64_t last, const Use& use) {
  int64_t p = first;
  for (; p + kPixels <= last; p += kPixels) use(p, Count<kPixels>{});
  for (; p < last; ++p) use(p, Count<1>{});
}

inline Floats sums_of(Floats* v) {
  return joined(v, [](Floats a, Floats b) RACCGAN_INLINE { return a + b; });
}
inline Floats maxima_of(Floats* v) { return joined(v, larger); }

typedef double Doubles __attribute__((vector_size(2 * kBytes)));

inline Doubles widened(Floats v) { return __builtin_convertvector(v, Doubles); }
inline Floats narrowed(Doubles v) { return __builtin_convertvector(v, Floats); }

inline double sum_of_lanes(Floats v) {
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

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

inline Floats gated(const CbamSpatialGate& gate, Floats scores) { return sigmoid(scores * gate.scale + gate.shift); }

// The gates of `count` scores, into memory that may be written up to a whole vector.
inline void find_gates(const CbamSpatialGate& gate, const float* scores, int64_t count, float* gates) {
  for_lanes(count, [&](auto lanes, int64_t at)
                       RACCGAN_INLINE { lanes.store(gates + at, gated(gate, lanes.load(scores + at))); });
}

// use(lanes, at, result) with result[i] = sum over j of matrix[at + i, j] vector[j], for `rows` rows.
template <class Use>
void matrix_product(const float* matrix, const float* vector, int64_t rows, int64_t columns, const Use& use) {
  for_lanes(rows, [&](auto lanes, int64_t at) RACCGAN_INLINE {
    const int64_t here = least(kWidth, rows - at);
    Floats sums[kWidth] = {};
    for (int64_t i = 0; i < here; ++i) {
      const float* const row = matrix + (at + i) * columns;
      Floats sum{};
      for_lanes(columns, [&](auto part, int64_t j)
                             RACCGAN_INLINE { sum = multiply_add(part.load(row + j), part.load(vector + j), sum); });
      sums[i] = sum;
    }
    use(lanes, at, sums_of(sums));
  });
}

struct Chunk {
  int64_t sample, first, last;  // pixels

  Chunk(const CbamShape& s, int64_t task)
      : sample(task / chunks(s)), first(task % chunks(s) * pixels_per_chunk(s)),
        last(least(s.h * s.w, first + pixels_per_chunk(s))) {}

  int64_t count() const { return last - first; }
  template <class T> const typename T::Stored* of(const CbamShape& s, const CbamSamples& samples) const {
    return static_cast<const typename T::Stored*>(samples.data) + in_tensor(s) - samples.first * s.h * s.w * s.c;
  }
  // Where the chunk begins in a tensor [N, P, C], in one [N, P], and in the first plane of one [N, 2, P].
  int64_t in_tensor(const CbamShape& s) const { return in_plane(s) * s.c; }
  int64_t in_plane(const CbamShape& s) const { return sample * s.h * s.w + first; }
  int64_t in_planes(const CbamShape& s) const { return sample * 2 * s.h * s.w + first; }
};
}}  // namespace raccgan
