// Matrix products as pointwise convolutions have them: many rows, few columns, few numbers to add up.
//
// A tile of kRows rows by a panel of columns stays in registers while all that it is the sum of goes by. The panel's
// columns are packed beforehand, so that they lie side by side in the nearest cache; the other factor is read where it
// lies, each word once for a whole row of the tile. A word is what is multiplied at a time: a float32, or two bfloat16
// of which each has its own partner and both products join one sum.
#include "pointwise.h"

#include "runs.h"

namespace raccgan {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // with 32 registers
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 2;
constexpr int64_t kPanel = kVectors * kWidth;  // columns
constexpr int64_t kNear = 1 << 18;             // bytes of rows that stay in the second-level cache as panels go by
constexpr int64_t kBlock = 256;                // pixels whose panel stays in the first-level cache

int64_t panels(int64_t columns) { return rounded_up(columns, kPanel) / kPanel; }

// ---- words ----------------------------------------------------------------------------------------------------------

struct Single : Float32 {
  static constexpr int64_t kTogether = 1;
  static Floats add(Floats sum, float a, Words b) { return multiply_add(all(a), (Floats)b, sum); }
  static float word(const float* at) { return *at; }
  static float rest(const float* at) { return *at; }
};

struct Pair : BFloat16 {
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

template <class T>
int64_t words(int64_t count) {
  return rounded_up(count, T::kTogether) / T::kTogether;
}

// The words whose first numbers are v[0], and whose second, where there are two, are v[1].
template <class T>
inline RACCGAN_INLINE Words together(const Floats* v) {
  if constexpr (T::kTogether == 1) {
    return (Words)v[0];
  } else {
    return BFloat16::rounded(v[0]) | BFloat16::rounded(v[1]) << 16;
  }
}

inline Words load_words(const float* from) { return (Words)load(from); }
inline void store_words(float* to, Words v) { store(to, (Floats)v); }

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <int N>
struct Rows {
  static constexpr int count = N;
};

// use(row, rows) for kRows rows at a time, then for fewer.
template <int kCount = kRows, class Use>
inline RACCGAN_INLINE void for_rows(int64_t row, int64_t last, const Use& use) {
  for (; row + kCount <= last; row += kCount) use(row, Rows<kCount>{});
  if constexpr (kCount > 1) for_rows<kCount / 2>(row, last, use);
}

// use(lanes, vector) for the vectors of a panel of which `columns` columns are there.
template <class Use>
inline RACCGAN_INLINE void for_vectors(int64_t columns, const Use& use) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = columns - v * kWidth;
    if (left >= kWidth) {
      use(Whole{}, v);
    } else if (left > 0) {
      use(Rest{left}, v);
    }
  }
}

// sums[r, .] += word(a + r * row) b[.], for a packed row b.
template <class T, int kCount, class Word>
inline RACCGAN_INLINE void add_word(const typename T::Stored* a, int64_t row, const float* b, const Word& word,
                                    Floats (&sums)[kCount][kVectors]) {
  Words columns[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) columns[v] = load_words(b + v * kWidth);
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    const auto value = word(a + r * row);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = T::add(sums[r][v], value, columns[v]);
  }
}

// sums[r, .] += sum over k of a[r * row + k] b[k, .], for `count` of k and a packed panel b. `step` leads from one word
// of a row to the next.
template <class T, int kCount>
inline RACCGAN_INLINE void add_products(const typename T::Stored* a, int64_t row, int64_t step, const float* b,
                                        int64_t count, Floats (&sums)[kCount][kVectors]) {
  for (int64_t k = count / T::kTogether; k > 0; --k, a += step, b += kPanel) add_word<T>(a, row, b, T::word, sums);
  if (count % T::kTogether != 0) add_word<T>(a, row, b, T::rest, sums);
}

// Of so many bytes the part that begins at `done` of `parts` and is `more` of them long, into the second-level cache:
// the processor's own prefetcher does not follow a tile's rows.
inline RACCGAN_INLINE void fetch_part(const void* from, int64_t bytes, int64_t done, int64_t more, int64_t parts) {
  const int64_t last = (done + more) * bytes / parts;
  for (int64_t at = done * bytes / parts; at < last; at += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
  }
}

// ---- packing ----------------------------------------------------------------------------------------------------------

// to[word, .] of rows b[k, .], k < count, of `columns` numbers and then zeros. Stored: how the rows are.
template <class T, class Stored>
void pack(const typename Stored::Stored* b, int64_t row, int64_t count, int64_t columns, float* to) {
  for (int64_t k = 0; k < count; k += T::kTogether, b += T::kTogether * row, to += kPanel) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(to + v * kWidth, Floats{});
    for_vectors(columns, [&](auto lanes, int v) RACCGAN_INLINE {
      Floats numbers[2] = {};
      for (int64_t i = 0; i < least(T::kTogether, count - k); ++i) {
        numbers[i] = lanes.template load<Stored>(b + i * row + v * kWidth);
      }
      store_words(to + v * kWidth, together<T>(numbers));
    });
  }
}

// The same of a transposed b, [columns, count].
template <class T>
void pack_transposed(const float* b, int64_t count, int64_t columns, float* to) {
  for (int64_t column = 0; column < kPanel; column += kWidth) {
    for_lanes(count, [&](auto lanes, int64_t k) RACCGAN_INLINE {
      Floats tile[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        tile[i] = column + i < columns ? lanes.template load<Float32>(b + (column + i) * count + k) : Floats{};
      }
      transpose(tile);  // what is beyond `count` is zero
      for (int64_t i = 0; i < least(kWidth, count - k); i += T::kTogether) {
        store_words(to + (k + i) / T::kTogether * kPanel + column, together<T>(tile + i));
      }
    });
  }
}

template <class T>
void pack_panel(const ProductArgs& args, int64_t panel, float* to) {
  const int64_t column = panel * kPanel, columns = least(kPanel, args.n - column);
  if (args.transposed) {
    pack_transposed<T>(args.b + column * args.k, args.k, columns, to);
  } else {
    pack<T, Float32>(args.b + column, args.n, args.k, columns, to);
  }
}

// ---- one panel of columns ---------------------------------------------------------------------------------------------

// Rows first <= m < last of out. `fetch`: what is read of a comes from memory.
template <class T>
void product_panel(const ProductArgs& args, int64_t first, int64_t last, int64_t panel, const float* packed,
                   bool fetch) {
  using Stored = typename T::Stored;
  const int64_t column = panel * kPanel, columns = least(kPanel, args.n - column);
  Floats bias[kVectors] = {};
  if (args.bias != nullptr) {
    for_vectors(columns, [&](auto lanes, int v) RACCGAN_INLINE {
      bias[v] = lanes.template load<Float32>(args.bias + column + v * kWidth);
    });
  }
  for_rows(first, last, [&](int64_t m, auto rows) RACCGAN_INLINE {
    const Stored* const a = static_cast<const Stored*>(args.a) + m * args.k;
    const int64_t size = rows.count * args.k;
    const int64_t at = m * args.n + column;
    Stored* const out = static_cast<Stored*>(args.out) + at;
    const Stored* const residual = args.residual ? static_cast<const Stored*>(args.residual) + at : nullptr;
    if (fetch) fetch_part(a + size, size * sizeof *a, 0, 1, 1);
    for (int r = 0; r < rows.count && residual != nullptr; ++r) {
      fetch_part(residual + r * args.n, columns * sizeof *residual, 0, 1, 1);
    }
    Floats sums[rows.count][kVectors] = {};
    add_products<T>(a, args.k, T::kTogether, packed, args.k, sums);
#pragma GCC unroll 8
    for (int r = 0; r < rows.count; ++r) {
      for_vectors(columns, [&](auto lanes, int v) RACCGAN_INLINE {
        const int64_t i = r * args.n + v * kWidth;
        const Floats sum = sums[r][v] + bias[v];
        lanes.template store<T>(out + i, residual ? sum + lanes.template load<T>(residual + i) : sum);
      });
    }
  });
}

// Few rows: of each panel all rows, in the memory of one panel.
template <class T>
void product_by_columns(const ProductArgs& args, float* packed, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    pack_panel<T>(args, panel, packed);
    product_panel<T>(args, 0, args.m, panel, packed, panel == begin);
  }
}

// Many rows: all panels are packed once, and go by a few rows at a time.
template <class T>
void product_by_rows(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t across = panels(args.n), first = begin * kRowsATask, last = least(args.m, end * kRowsATask);
  const auto packed = [&](int64_t panel) { return scratch + panel * words<T>(args.k) * kPanel; };
  for (int64_t panel = 0; panel < across; ++panel) pack_panel<T>(args, panel, packed(panel));
  const int64_t row_bytes = most(1, args.k) * sizeof(typename T::Stored);
  const int64_t near = most(kRows, kNear / row_bytes / kRows * kRows);
  for (int64_t row = first; row < last; row += near) {
    for (int64_t panel = 0; panel < across; ++panel) {
      product_panel<T>(args, row, least(last, row + near), panel, packed(panel), panel == 0);
    }
  }
}

template <class T>
void product_as(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  by_columns(args) ? product_by_columns<T>(args, scratch, begin, end) : product_by_rows<T>(args, scratch, begin, end);
}

// What correlate_panel reads of a, for a block of pixels: where it lies, or packed into words.
template <class T>
struct Factor {
  const typename T::Stored* at;
  int64_t row, step;  // from one i to the next, from one word of pixels to the next

  Factor(const typename T::Stored* a, int64_t pixels, int64_t i, float* scratch) {
    if constexpr (T::kTogether == 1) {
      at = a, row = 1, step = i;
    } else {
      const int64_t wide = rounded_up(i, kWidth);
      for (int64_t m = 0; m < pixels; m += 2) {
        for_lanes(i, [&](auto lanes, int64_t k) RACCGAN_INLINE {
          const Floats numbers[2] = {lanes.template load<T>(a + m * i + k),
                                     m + 1 < pixels ? lanes.template load<T>(a + (m + 1) * i + k) : Floats{}};
          store_words(scratch + m / 2 * wide + k, (Words)numbers[0] >> 16 | (Words)numbers[1]);
        });
      }
      at = reinterpret_cast<const typename T::Stored*>(scratch), row = 2, step = 2 * wide;
    }
  }
};

template <class T>
int64_t factor_floats(int64_t i) {
  return T::kTogether == 1 ? 0 : kBlock / T::kTogether * rounded_up(i, kWidth);
}

// partial[i, .] += the sums over a block of pixels, in the panel of columns that begins at `column`. What the next
// block reads is fetched by and by: this is panel `turn` of `turns`.
template <class T>
void correlation_panel(const CorrelationArgs& args, const Factor<T>& a, int64_t pixels, const float* packed,
                       int64_t column, float* partial, int64_t last, int64_t turn, int64_t turns) {
  const int64_t columns = least(kPanel, args.j - column), next = least(kBlock, args.m - last);
  const auto fetch = [&](const void* from, int64_t channels, int64_t done, int64_t more) RACCGAN_INLINE {
    const auto* const at = static_cast<const typename T::Stored*>(from) + last * channels;
    fetch_part(at, next * channels * sizeof *at, done, more, turns * args.i);
  };
  for_rows(0, args.i, [&](int64_t i, auto rows) RACCGAN_INLINE {
    fetch(args.a, args.i, turn * args.i + i, rows.count);
    fetch(args.b, args.j, turn * args.i + i, rows.count);
    Floats sums[rows.count][kVectors] = {};
    add_products<T>(a.at + i * a.row, a.row, a.step, packed, rounded_up(pixels, T::kTogether), sums);
#pragma GCC unroll 8
    for (int r = 0; r < rows.count; ++r) {
      for_vectors(columns, [&](auto lanes, int v) RACCGAN_INLINE {
        float* const to = partial + (i + r) * args.j + column + v * kWidth;
        lanes.template store<Float32>(to, lanes.template load<Float32>(to) + sums[r][v]);
      });
    }
  });
}

// sums[i] += the sum over so many pixels.
template <class T>
void add_up_pixels(const typename T::Stored* a, int64_t pixels, int64_t i, float* sums) {
  for_lanes(i, [&](auto lanes, int64_t at) RACCGAN_INLINE {
    Floats sum{};
    for (int64_t m = 0; m < pixels; ++m) sum += lanes.template load<T>(a + m * i + at);
    lanes.template store<Float32>(sums + at, lanes.template load<Float32>(sums + at) + sum);
  });
}

template <class T>
void correlation_as(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end) {
  using Stored = typename T::Stored;
  const auto *const a = static_cast<const Stored*>(args.a), *const b = static_cast<const Stored*>(args.b);
  float* const packed = scratch + factor_floats<T>(args.i);
  const int64_t across = panels(args.j);
  for (int64_t count; begin < end; begin += count) {
    const int64_t piece = begin / across, panel = begin % across;
    count = least(across - panel, end - begin);
    float* const partial = args.partial + piece * args.i * args.j;
    const int64_t first_column = panel * kPanel, last_column = least(args.j, (panel + count) * kPanel);
    for (int64_t i = 0; i < args.i; ++i) {
      for (int64_t j = first_column; j < last_column; ++j) partial[i * args.j + j] = 0;
    }
    float* const sums = args.sums != nullptr && panel == 0 ? args.sums + piece * args.i : nullptr;
    if (sums != nullptr) memset(sums, 0, args.i * sizeof *sums);
    const int64_t last = least(args.m, (piece + 1) * kCorrelationPiece);
    for (int64_t m = piece * kCorrelationPiece; m < last; m += kBlock) {
      const int64_t pixels = least(kBlock, last - m);
      if (sums != nullptr) add_up_pixels<T>(a + m * args.i, pixels, args.i, sums);
      const Factor<T> factor(a + m * args.i, pixels, args.i, scratch);
      for (int64_t turn = 0; turn < count; ++turn) {
        const int64_t column = first_column + turn * kPanel;
        pack<T, T>(b + m * args.j + column, args.j, pixels, least(kPanel, args.j - column), packed);
        correlation_panel<T>(args, factor, pixels, packed, column, partial, m + pixels, turn, count);
      }
    }
  }
}

}  // namespace

namespace RACCGAN_TARGET {

int64_t product_tasks(const ProductArgs& args) {
  return by_columns(args) ? panels(args.n) : rounded_up(args.m, kRowsATask) / kRowsATask;
}

int64_t product_scratch(const ProductArgs& args) {
  const int64_t of_k = args.dtype == Dtype::kFloat32 ? words<Single>(args.k) : words<Pair>(args.k);
  return (by_columns(args) ? 1 : panels(args.n)) * of_k * kPanel;
}

void product(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto run = args.dtype == Dtype::kFloat32 ? product_as<Single> : product_as<Pair>;
  run(args, scratch, begin, end);
}

int64_t correlation_tasks(const CorrelationArgs& args) { return correlation_pieces(args.m) * panels(args.j); }

int64_t correlation_scratch(const CorrelationArgs& args) {
  return args.dtype == Dtype::kFloat32 ? factor_floats<Single>(args.i) + kBlock * kPanel
                                       : factor_floats<Pair>(args.i) + kBlock / 2 * kPanel;
}

void correlation(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto run = args.dtype == Dtype::kFloat32 ? correlation_as<Single> : correlation_as<Pair>;
  run(args, scratch, begin, end);
}

}  // namespace RACCGAN_TARGET
}  // namespace raccgan
