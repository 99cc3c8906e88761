// Vectors of channels and of pixels, and the products of the MLP, for all passes of CBAM.
#pragma once

#include "../../ops/cbam.h"
#include "../simd/runs.h"

namespace raccgan { namespace {
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

// use(lanes, p, c, pixels) for all channels of these pixels: pixel after pixel, a vector of channels at a time.
template <class Use>
inline RACCGAN_INLINE void for_values(int64_t first, int64_t last, int64_t channels, const Use& use) {
  for_pixels(first, last, [&](int64_t p, auto pixels) RACCGAN_INLINE {
    for_lanes(channels, [&](auto lanes, int64_t c) RACCGAN_INLINE { use(lanes, p, c, pixels); });
  });
}

inline Floats reaches(Floats u, Floats max) { return select((Words)(u == max), all(1.0f), Floats{}); }

// sums[c] += v, or = v at the first pixel.
template <class L> inline RACCGAN_INLINE void add_to(const L& lanes, float* sums, int64_t p, Floats v) {
  lanes.store(sums, p == 0 ? v : v + lanes.load(sums));
}

inline Floats sums_of(Floats* v) {
  return joined(v, [](Floats a, Floats b) RACCGAN_INLINE { return a + b; });
}
inline Floats maxima_of(Floats* v) { return joined(v, larger); }

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

// to[j] = the sum over i of matrix[i, j] vector[i].
inline void transposed_product(const float* matrix, const float* vector, int64_t rows, int64_t columns, float* to) {
  for_lanes(columns, [&](auto lanes, int64_t j) RACCGAN_INLINE {
    Floats sum{};
    for (int64_t i = 0; i < rows; ++i) {
      sum = multiply_add(lanes.load(matrix + i * columns + j), all(vector[i]), sum);
    }
    lanes.store(to + j, sum);
  });
}

// to[j] = the sum over n of a[n] b[n, j], rows of a and b `a_stride` and `b_stride` apart.
inline void outer_sum(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t n, int64_t columns,
                      bool add, float* to) {
  for_lanes(columns, [&](auto lanes, int64_t j) RACCGAN_INLINE {
    Floats sum = add ? lanes.load(to + j) : Floats{};
    for (int64_t i = 0; i < n; ++i) {
      sum = multiply_add(all(a[i * a_stride]), lanes.load(b + i * b_stride + j), sum);
    }
    lanes.store(to + j, sum);
  });
}

inline float strided_sum(const float* v, int64_t stride, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += v[i * stride];
  return static_cast<float>(sum);
}

// From logits [C], what flows to the argument of sample n's channel gate, to both hidden layers before their ReLU.
inline void hidden_back(const CbamArgs& args, int64_t n, const float* logits, float* to) {
  const int64_t r = args.shape.r;
  const float* const hidden = args.saved.hidden + n * 3 * r;
  transposed_product(args.weights.expand_weight, logits, args.shape.c, r, to);
  for (int64_t i = 0; i < r; ++i) {
    const float g = to[i];
    to[i] = hidden[i] > 0 ? g : 0;
    to[r + i] = hidden[r + i] > 0 ? g : 0;
  }
}

// From there to the average and the max over the pixels.
inline void pooled_back(const CbamArgs& args, const float* hidden, float* average, float* maximum) {
  const int64_t r = args.shape.r, c = args.shape.c;
  transposed_product(args.weights.reduce_weight, hidden, r, c, average);
  transposed_product(args.weights.reduce_weight, hidden + r, r, c, maximum);
}
}}  // namespace raccgan
