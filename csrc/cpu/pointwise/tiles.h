// The arithmetic of a matrix product: the sums of a tile, kRows rows by a panel of columns, stay in registers. The
// panel's columns are packed before, so that they lie side by side in the first-level cache; the other factor is read
// in place, each word once for a whole row of the tile. One multiplication takes a word of either factor: a float32, or
// two bfloat16, whose two products join one sum.
#pragma once

#include "../../ops/dtype.h"
#include "../simd/runs.h"

namespace raccgan { namespace {
constexpr int kRows = kManyRegisters ? 8 : 4;
constexpr int kVectors = 2;
constexpr int64_t kPanel = kVectors * kWidth;  // columns

constexpr int64_t kMultiplyAddsAnElement = 32;  // that take as long as an element of share_out

constexpr int64_t kFew = 4;  // an image's channels at most: as columns they would leave a panel nearly empty

bool few(int64_t columns) { return columns <= kFew; }

int64_t panels(int64_t columns) { return rounded_up(columns, kPanel) / kPanel; }

struct Float32Word : Float32 {
  static constexpr int64_t kTogether = 1;
  static Floats add(Floats sum, float a, Words b) { return multiply_add(all(a), (Floats)b, sum); }
  static float word(const float* at) { return *at; }
  static float rest(const float* at) { return *at; }
};

struct BFloat16Pair : BFloat16 {
  static constexpr int64_t kTogether = 2;
  static Floats add(Floats sum, uint32_t a, Words b) {
    const Words both = a - Words{};
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)b);
#else
    const Floats first = multiply_add((Floats)(both << 16), (Floats)(b << 16), sum);
    return multiply_add((Floats)(both & 0xffff0000), (Floats)(b & 0xffff0000), first);
#endif
  }
  static uint32_t word(const uint16_t* at) {
    uint32_t both;
    memcpy(&both, at, sizeof both);
    return both;
  }
  static uint32_t rest(const uint16_t* at) { return *at; }  // the last of an odd number
};

template <class T> int64_t words(int64_t count) { return rounded_up(count, T::kTogether) / T::kTogether; }

// Words of the numbers v[0] and, of pairs, v[1].
template <class T> inline RACCGAN_INLINE Words together(const Floats* v) {
  if constexpr (T::kTogether == 1) {
    return (Words)v[0];
  } else {
    return BFloat16::rounded(v[0]) | BFloat16::rounded(v[1]) << 16;
  }
}

inline Words load_words(const float* from) { return (Words)load(from); }
inline void store_words(float* to, Words v) { store(to, (Floats)v); }

// use(row, rows) for kRows rows at a time, then for fewer.
template <int kCount = kRows, class Use>
inline RACCGAN_INLINE void for_rows(int64_t row, int64_t last, const Use& use) {
  for (; row + kCount <= last; row += kCount) use(row, Count<kCount>{});
  if constexpr (kCount > 1) for_rows<kCount / 2>(row, last, use);
}

// sums[r, .] += word(a + r * row) b[.], for a packed row b.
template <class T, int kCount, int kAcross, class Word>
inline RACCGAN_INLINE void add_word(const typename T::Stored* a, int64_t row, const float* b, const Word& word,
                                    Floats (&sums)[kCount][kAcross]) {
  Words columns[kAcross];
#pragma GCC unroll 2
  for (int v = 0; v < kAcross; ++v) columns[v] = load_words(b + v * kWidth);
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    const auto value = word(a + r * row);
#pragma GCC unroll 2
    for (int v = 0; v < kAcross; ++v) sums[r][v] = T::add(sums[r][v], value, columns[v]);
  }
}

// sums[r, .] += sum over k < count of a[r * row + k] b[k, .], for a packed panel b. The words of a row lie `step`
// apart. Of a panel that is half empty only the first vector has a sum.
template <class T, int kCount, int kAcross>
inline RACCGAN_INLINE void add_products(const typename T::Stored* a, int64_t row, int64_t step, const float* b,
                                        int64_t count, Floats (&sums)[kCount][kAcross]) {
  for (int64_t k = count / T::kTogether; k > 0; --k, a += step, b += kPanel) add_word<T>(a, row, b, T::word, sums);
  if (count % T::kTogether != 0) add_word<T>(a, row, b, T::rest, sums);
}

// Prefetches into the second-level cache: the processor does not prefetch along a tile's rows by itself.
inline RACCGAN_INLINE void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

// to[word, .]: rows b[k, .], k < count, of `columns` numbers and then zeros. Stored is the type of b's elements.
template <class T, class Stored>
void pack(const typename Stored::Stored* b, int64_t row, int64_t count, int64_t columns, float* to) {
  for (int64_t k = 0; k < count; k += T::kTogether, b += T::kTogether * row, to += kPanel) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(to + v * kWidth, Floats{});
    for_vectors<kVectors>(columns, [&](auto lanes, int v) RACCGAN_INLINE {
      Floats numbers[2] = {};
      for (int64_t i = 0; i < least(T::kTogether, count - k); ++i) {
        numbers[i] = lanes.template load<Stored>(b + i * row + v * kWidth);
      }
      store_words(to + v * kWidth, together<T>(numbers));
    });
  }
}

// The same of a transposed b, [columns, count].
template <class T, class Stored>
void pack_transposed(const typename Stored::Stored* b, int64_t count, int64_t columns, float* to) {
  for (int64_t column = 0; column < kPanel; column += kWidth) {
    for_lanes(count, [&](auto lanes, int64_t k) RACCGAN_INLINE {
      Floats tile[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        tile[i] = column + i < columns ? lanes.template load<Stored>(b + (column + i) * count + k) : Floats{};
      }
      transpose(tile);  // what is beyond `count` is zero
      for (int64_t i = 0; i < least(kWidth, count - k); i += T::kTogether) {
        store_words(to + (k + i) / T::kTogether * kPanel + column, together<T>(tile + i));
      }
    });
  }
}
}}  // namespace raccgan
