// Matrix products as pointwise convolutions have them: many rows, few columns, few numbers to add up.
#include "pointwise.h"

#include "pointwise_tiles.h"

namespace raccgan {
namespace {

constexpr int64_t kNear = 1 << 18;  // bytes of rows that stay in the second-level cache as panels go by
constexpr int64_t kBlock = 256;     // pixels whose panel stays in the first-level cache
constexpr int64_t kFew = 4;         // columns at most: an image's channels

bool few(int64_t columns) { return columns <= kFew; }

template <class T>
void pack_panel(const ProductArgs& args, int64_t panel, float* to) {
  const int64_t column = panel * kPanel, columns = least(kPanel, args.n - column);
  if (args.transposed) {
    pack_transposed<T, Float32>(args.b + column * args.k, args.k, columns, to);
  } else {
    pack<T, Float32>(args.b + column, args.n, args.k, columns, to);
  }
}

// ---- one panel of columns ---------------------------------------------------------------------------------------------

// Rows first <= m < last of out. `cold`: what is read of a comes from memory.
template <class T>
void product_panel(const ProductArgs& args, int64_t first, int64_t last, int64_t panel, const float* packed,
                   bool cold) {
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
    if (cold) fetch(a + size, size * sizeof *a);
    for (int r = 0; r < rows.count && residual != nullptr; ++r) {
      fetch(residual + r * args.n, columns * sizeof *residual);
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

// ---- few rows and long sums: the factors changed over, so that the few are packed and b is read as it lies ----------

// Of the time of packing b it takes 0.65 to 0.85 with up to 64 rows of 256 numbers or more, in float32; with shorter
// sums what it takes to turn the results weighs more.
bool turns(const ProductArgs& args) { return args.transposed && args.m <= 64 && args.k >= 256; }

// Rows of b that are multiplied by one panel after the other.
int64_t rows_of_b(const ProductArgs& args) { return most(kRows, kNear / 4 / most(1, args.k) / kRows * kRows); }

// Rows first <= n < last of b as words: where they are, or rounded to `scratch`.
template <class T>
const typename T::Stored* words_of_b(const ProductArgs& args, int64_t first, int64_t last, float* scratch) {
  const float* const b = args.b + first * args.k;
  if constexpr (T::kTogether == 1) {
    return b;
  } else {
    auto* const to = reinterpret_cast<typename T::Stored*>(scratch);
    for_lanes((last - first) * args.k, [&](auto lanes, int64_t i) RACCGAN_INLINE {
      lanes.template store<T>(to + i, lanes.template load<Float32>(b + i));
    });
    return to;
  }
}

// out[m + i, n + r] = sums[r][i] + bias[n + r] + residual[m + i, n + r], for i < count.
template <class T, int kCount, int kAcross>
inline RACCGAN_INLINE void store_turned(const ProductArgs& args, Floats (&sums)[kCount][kAcross], int64_t m,
                                        int64_t count, int64_t n) {
  constexpr Rest kLanes{kCount};
  const Floats bias = args.bias ? kLanes.load<Float32>(args.bias + n) : Floats{};
#pragma GCC unroll 2
  for (int v = 0; v < kAcross; ++v) {
    Floats numbers[kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) numbers[r] = sums[r][v];
    interleave(numbers);
    float block[kCount * kWidth];
    memcpy(block, numbers, sizeof block);
    for (int64_t i = v * kWidth; i < least(count, (v + 1) * kWidth); ++i) {
      const int64_t at = (m + i) * args.n + n;
      Floats sum = kLanes.load<Float32>(block + (i - v * kWidth) * kCount) + bias;
      if (args.residual != nullptr) sum += kLanes.load<T>(static_cast<const typename T::Stored*>(args.residual) + at);
      kLanes.store<T>(static_cast<typename T::Stored*>(args.out) + at, sum);
    }
  }
}

// Rows of b first <= n < last, as words, by a packed panel of `count` rows of a from m on.
template <class T, int kAcross>
void product_turned(const ProductArgs& args, const typename T::Stored* b, int64_t first, int64_t last, int64_t m,
                    int64_t count, const float* packed) {
  for_rows(first, last, [&](int64_t n, auto rows) RACCGAN_INLINE {
    Floats sums[rows.count][kAcross] = {};
    add_products<T>(b + (n - first) * args.k, args.k, T::kTogether, packed, args.k, sums);
    store_turned<T>(args, sums, m, count, n);
  });
}

template <class T>
void product_by_rows_of_b(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t across = panels(args.m), near = rows_of_b(args), last = least(args.n, end * kPanel);
  const auto rows = [&](int64_t panel) { return least(kPanel, args.m - panel * kPanel); };
  const auto packed = [&](int64_t panel) { return scratch + panel * words<T>(args.k) * kPanel; };
  for (int64_t panel = 0; panel < across; ++panel) {
    const auto* const a = static_cast<const typename T::Stored*>(args.a) + panel * kPanel * args.k;
    pack_transposed<T, T>(a, args.k, rows(panel), packed(panel));
  }
  for (int64_t n = begin * kPanel; n < last; n += near) {
    const int64_t until = least(last, n + near);
    const auto* const b = words_of_b<T>(args, n, until, packed(across));
    for (int64_t panel = 0; panel < across; ++panel) {
      const auto multiply = rows(panel) > kWidth ? product_turned<T, 2> : product_turned<T, 1>;
      multiply(args, b, n, until, panel * kPanel, rows(panel), packed(panel));
    }
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

// Few columns would leave a panel nearly empty, so here a vector lies along k: for each of kWidth rows it holds a sum in
// every lane, which are joined in the end. b is packed column by column.
template <class T>
void product_of_few(const ProductArgs& args, float* packed, int64_t begin, int64_t end) {
  using Stored = typename T::Stored;
  const int64_t last = least(args.m, end * kRowsATask);
  for (int64_t n = 0; n < args.n; ++n) {
    for (int64_t k = 0; k < args.k; ++k) {
      packed[n * args.k + k] = args.b[args.transposed ? n * args.k + k : k * args.n + n];
    }
  }
  for (int64_t m = begin * kRowsATask; m < last; m += kWidth) {
    const int64_t rows = least(kWidth, last - m);
    const Stored* const a = static_cast<const Stored*>(args.a) + m * args.k;
    float block[kFew * kWidth];  // [rows, N]
    for (int64_t n = 0; n < args.n; ++n) {
      Floats sums[kWidth] = {};
      for (int64_t row = 0; row < rows; ++row) {
        for_lanes(args.k, [&](auto lanes, int64_t k) RACCGAN_INLINE {
          const Floats factor = lanes.template load<Float32>(packed + n * args.k + k);
          sums[row] = multiply_add(lanes.template load<T>(a + row * args.k + k), factor, sums[row]);
        });
      }
      float joint[kWidth];
      store(joint, joined(sums, [](Floats x, Floats y) RACCGAN_INLINE { return x + y; }));
      for (int64_t row = 0; row < rows; ++row) block[row * args.n + n] = joint[row] + (args.bias ? args.bias[n] : 0);
    }
    for_lanes(rows * args.n, [&](auto lanes, int64_t i) RACCGAN_INLINE {
      const int64_t at = m * args.n + i;
      Floats sum = lanes.template load<Float32>(block + i);
      if (args.residual != nullptr) sum += lanes.template load<T>(static_cast<const Stored*>(args.residual) + at);
      lanes.template store<T>(static_cast<Stored*>(args.out) + at, sum);
    });
  }
}

template <class T>
void product_as(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  if (few(args.n)) return product_of_few<T>(args, scratch, begin, end);
  if (!by_columns(args)) return product_by_rows<T>(args, scratch, begin, end);
  if (turns(args)) return product_by_rows_of_b<T>(args, scratch, begin, end);
  product_by_columns<T>(args, scratch, begin, end);
}

// What correlation_panel reads of a, for a block of pixels: where it lies, or packed into words.
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

// Where the product lies in memory.
struct Partial {
  float* data;
  int64_t row, column;  // from one to the next

  // [i, j + lane] += sum
  template <class Lanes>
  RACCGAN_INLINE void add(int64_t i, int64_t j, const Lanes& lanes, Floats sum) const {
    float* const to = data + i * row + j * column;
    if (column == 1) return lanes.template store<Float32>(to, lanes.template load<Float32>(to) + sum);
    float numbers[kWidth] = {};
    lanes.template store<Float32>(numbers, sum);
    for (int64_t lane = 0; lane < lanes.size(); ++lane) to[lane * column] += numbers[lane];
  }
};

// partial[i, .] += the sums over a block of pixels, in the panel of columns that begins at `column`. What the next
// block reads is fetched by and by: this is panel `turn` of `turns`.
template <class T>
void correlation_panel(const CorrelationArgs& args, const Factor<T>& a, int64_t pixels, const float* packed,
                       int64_t column, const Partial& partial, int64_t last, int64_t turn, int64_t turns) {
  const int64_t columns = least(kPanel, args.j - column), next = least(kBlock, args.m - last);
  // Of the next block's pixels of `channels`, as large a part as `more` rows are of all rows of all turns.
  const auto fetch_part = [&](const void* from, int64_t channels, int64_t row, int64_t more) RACCGAN_INLINE {
    const int64_t bytes = next * channels * sizeof(typename T::Stored), all = turns * args.i;
    const int64_t done = turn * args.i + row, begin = done * bytes / all;
    fetch(static_cast<const typename T::Stored*>(from) + last * channels + begin / sizeof(typename T::Stored),
          (done + more) * bytes / all - begin);
  };
  for_rows(0, args.i, [&](int64_t i, auto rows) RACCGAN_INLINE {
    fetch_part(args.a, args.i, i, rows.count);
    fetch_part(args.b, args.j, i, rows.count);
    Floats sums[rows.count][kVectors] = {};
    add_products<T>(a.at + i * a.row, a.row, a.step, packed, rounded_up(pixels, T::kTogether), sums);
#pragma GCC unroll 8
    for (int r = 0; r < rows.count; ++r) {
      for_vectors(columns, [&](auto lanes, int v) RACCGAN_INLINE {
        partial.add(i + r, column + v * kWidth, lanes, sums[r][v]);
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

// With the factors changed over where b's few columns would leave a panel nearly empty.
CorrelationArgs turned(const CorrelationArgs& args) {
  CorrelationArgs other = args;
  if (few(args.j)) other.i = args.j, other.a = args.b, other.j = args.i, other.b = args.a;
  return other;
}

template <class T>
void correlation_as(const CorrelationArgs& given, float* scratch, int64_t begin, int64_t end) {
  using Stored = typename T::Stored;
  const CorrelationArgs args = turned(given);
  const auto *const a = static_cast<const Stored*>(args.a), *const b = static_cast<const Stored*>(args.b);
  float* const packed = scratch + factor_floats<T>(args.i);
  const int64_t across = panels(args.j);
  for (int64_t count; begin < end; begin += count) {
    const int64_t piece = begin / across, panel = begin % across;
    count = least(across - panel, end - begin);
    float* const data = args.partial + piece * args.i * args.j;
    const Partial partial = few(given.j) ? Partial{data, 1, given.j} : Partial{data, args.j, 1};
    const int64_t first_column = panel * kPanel, last_column = least(args.j, (panel + count) * kPanel);
    for (int64_t i = 0; i < args.i; ++i) {
      for (int64_t j = first_column; j < last_column; ++j) data[i * partial.row + j * partial.column] = 0;
    }
    float* const sums = args.sums != nullptr && panel == 0 ? args.sums + piece * given.i : nullptr;
    if (sums != nullptr) memset(sums, 0, given.i * sizeof *sums);
    const int64_t last = least(args.m, (piece + 1) * kCorrelationPiece);
    for (int64_t m = piece * kCorrelationPiece; m < last; m += kBlock) {
      const int64_t pixels = least(kBlock, last - m);
      if (sums != nullptr) {
        add_up_pixels<T>(static_cast<const Stored*>(given.a) + m * given.i, pixels, given.i, sums);
      }
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
  return by_columns(args) && !few(args.n) ? panels(args.n) : rounded_up(args.m, kRowsATask) / kRowsATask;
}

int64_t product_scratch(const ProductArgs& args) {
  if (few(args.n)) return args.k * args.n;
  const int64_t panel = (args.dtype == Dtype::kFloat32 ? words<Single>(args.k) : words<Pair>(args.k)) * kPanel;
  if (!by_columns(args)) return panels(args.n) * panel;
  return turns(args) ? panels(args.m) * panel + (rows_of_b(args) * args.k + 1) / 2 : panel;
}

void product(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto run = args.dtype == Dtype::kFloat32 ? product_as<Single> : product_as<Pair>;
  run(args, scratch, begin, end);
}

int64_t correlation_tasks(const CorrelationArgs& args) { return correlation_pieces(args.m) * panels(turned(args).j); }

int64_t correlation_scratch(const CorrelationArgs& given) {
  const CorrelationArgs args = turned(given);
  return args.dtype == Dtype::kFloat32 ? factor_floats<Single>(args.i) + kBlock * kPanel
                                       : factor_floats<Pair>(args.i) + kBlock / 2 * kPanel;
}

void correlation(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto run = args.dtype == Dtype::kFloat32 ? correlation_as<Single> : correlation_as<Pair>;
  run(args, scratch, begin, end);
}

}  // namespace RACCGAN_TARGET
}  // namespace raccgan
