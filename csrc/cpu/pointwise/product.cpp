// The products of a pointwise convolution and of its gradient in x: many rows, few columns, few numbers to add up.
#include "../kernels.h"
#include "../threads.h"
#include "tiles.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
// Few rows are split by columns instead: a thread with some of the rows would pack all of b.
bool by_columns(const ProductArgs& args) { return args.m < 8 * kRowsATask; }

// Rows, in whole tiles and of `bytes` each, that stay in the second-level cache from panel to panel.
int64_t rows_that_stay(int64_t bytes) {
  constexpr int64_t kNear = 1 << 18;
  return most(kRows, kNear / most(1, bytes) / kRows * kRows);
}

template <class T> void pack_panel(const ProductArgs& args, int64_t panel, float* to) {
  const int64_t column = panel * kPanel, columns = least(kPanel, args.n - column);
  if (args.transposed) {
    pack_transposed<T, Float32>(args.b + column * args.k, args.k, columns, to);
  } else {
    pack<T, Float32>(args.b + column, args.n, args.k, columns, to);
  }
}

template <class T> int64_t panel_floats(const ProductArgs& args) { return words<T>(args.k) * kPanel; }

// Rows first <= m < last of out. `cold`: a is not in the cache yet.
template <class T>
void product_panel(const ProductArgs& args, int64_t first, int64_t last, int64_t panel, const float* packed,
                   bool cold) {
  using Stored = typename T::Stored;
  const int64_t column = panel * kPanel, columns = least(kPanel, args.n - column);
  Floats bias[kVectors] = {};
  if (args.bias != nullptr) {
    for_vectors<kVectors>(columns, [&](auto lanes, int v)
                                       RACCGAN_INLINE { bias[v] = lanes.load(args.bias + column + v * kWidth); });
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
      for_vectors<kVectors>(columns, [&](auto lanes, int v) RACCGAN_INLINE {
        const int64_t i = r * args.n + v * kWidth;
        const Floats sum = sums[r][v] + bias[v];
        lanes.template store<T>(out + i, residual ? sum + lanes.template load<T>(residual + i) : sum);
      });
    }
  });
}

// Few rows: all of them for one panel after the other, which share the memory of one packed panel.
template <class T> void product_by_columns(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const float* const packed = args.packed != nullptr ? args.packed + panel * panel_floats<T>(args) : scratch;
    if (args.packed == nullptr) pack_panel<T>(args, panel, scratch);
    product_panel<T>(args, 0, args.m, panel, packed, panel == begin);
  }
}

// Many rows: all panels are packed once, or were before the call; a few rows meet all panels before the next rows do.
template <class T> void product_by_rows(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t across = panels(args.n), first = begin * kRowsATask, last = least(args.m, end * kRowsATask);
  const int64_t size = panel_floats<T>(args);
  const float* const packed = args.packed != nullptr ? args.packed : scratch;
  for (int64_t panel = 0; panel < across && args.packed == nullptr; ++panel) {
    pack_panel<T>(args, panel, scratch + panel * size);
  }
  const int64_t near = rows_that_stay(args.k * sizeof(typename T::Stored));
  for (int64_t row = first; row < last; row += near) {
    for (int64_t panel = 0; panel < across; ++panel) {
      product_panel<T>(args, row, least(last, row + near), panel, packed + panel * size, panel == 0);
    }
  }
}

// With up to 64 rows of 256 numbers or more, in float32, this takes 0.65 to 0.85 of the time of packing b. With shorter
// sums transposing the results costs more than packing.
bool transposes(const ProductArgs& args) {
  return args.packed == nullptr && args.transposed && args.m <= 64 && args.k >= 256;
}

// Rows of b that meet all panels before the next rows do.
int64_t rows_of_b(const ProductArgs& args) { return rows_that_stay(args.k * sizeof *args.b); }

// Rows first <= n < last of b as words: in place, or rounded to `scratch`.
template <class T>
const typename T::Stored* words_of_b(const ProductArgs& args, int64_t first, int64_t last, float* scratch) {
  const float* const b = args.b + first * args.k;
  if constexpr (T::kTogether == 1) {
    return b;
  } else {
    auto* const to = reinterpret_cast<typename T::Stored*>(scratch);
    for_lanes((last - first) * args.k,
              [&](auto lanes, int64_t i) RACCGAN_INLINE { lanes.template store<T>(to + i, lanes.load(b + i)); });
    return to;
  }
}

// out[m + i, n + r] = sums[r][i] + bias[n + r] + residual[m + i, n + r], for i < count.
template <class T, int kCount, int kAcross>
inline RACCGAN_INLINE void store_transposed(const ProductArgs& args, Floats (&sums)[kCount][kAcross], int64_t m,
                                            int64_t count, int64_t n) {
  constexpr Rest kLanes{kCount};
  const Floats bias = args.bias ? kLanes.load(args.bias + n) : Floats{};
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
      Floats sum = kLanes.load(block + (i - v * kWidth) * kCount) + bias;
      if (args.residual != nullptr) sum += kLanes.load<T>(static_cast<const typename T::Stored*>(args.residual) + at);
      kLanes.store<T>(static_cast<typename T::Stored*>(args.out) + at, sum);
    }
  }
}

// Rows first <= n < last of b, as words, by a packed panel of rows m to m + count of a.
template <class T, int kAcross>
void product_transposed(const ProductArgs& args, const typename T::Stored* b, int64_t first, int64_t last, int64_t m,
                        int64_t count, const float* packed) {
  for_rows(first, last, [&](int64_t n, auto rows) RACCGAN_INLINE {
    Floats sums[rows.count][kAcross] = {};
    add_products<T>(b + (n - first) * args.k, args.k, T::kTogether, packed, args.k, sums);
    store_transposed<T>(args, sums, m, count, n);
  });
}

template <class T> void product_by_rows_of_b(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t across = panels(args.m), near = rows_of_b(args), last = least(args.n, end * kPanel);
  const auto rows = [&](int64_t panel) { return least(kPanel, args.m - panel * kPanel); };
  const auto packed = [&](int64_t panel) { return scratch + panel * panel_floats<T>(args); };
  for (int64_t panel = 0; panel < across; ++panel) {
    const auto* const a = static_cast<const typename T::Stored*>(args.a) + panel * kPanel * args.k;
    pack_transposed<T, T>(a, args.k, rows(panel), packed(panel));
  }
  for (int64_t n = begin * kPanel; n < last; n += near) {
    const int64_t until = least(last, n + near);
    const auto* const b = words_of_b<T>(args, n, until, packed(across));
    for (int64_t panel = 0; panel < across; ++panel) {
      const auto multiply = rows(panel) > kWidth ? product_transposed<T, 2> : product_transposed<T, 1>;
      multiply(args, b, n, until, panel * kPanel, rows(panel), packed(panel));
    }
  }
}

// Vectors lie along k: each of kWidth rows has a sum in every lane, and the lanes are joined in the end. b is packed
// column by column.
template <class T> void product_of_few(const ProductArgs& args, float* packed, int64_t begin, int64_t end) {
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
          const Floats factor = lanes.load(packed + n * args.k + k);
          sums[row] = multiply_add(lanes.template load<T>(a + row * args.k + k), factor, sums[row]);
        });
      }
      float joint[kWidth];
      store(joint, joined(sums, [](Floats x, Floats y) RACCGAN_INLINE { return x + y; }));
      for (int64_t row = 0; row < rows; ++row) block[row * args.n + n] = joint[row] + (args.bias ? args.bias[n] : 0);
    }
    for_lanes(rows * args.n, [&](auto lanes, int64_t i) RACCGAN_INLINE {
      const int64_t at = m * args.n + i;
      Floats sum = lanes.load(block + i);
      if (args.residual != nullptr) sum += lanes.template load<T>(static_cast<const Stored*>(args.residual) + at);
      lanes.template store<T>(static_cast<Stored*>(args.out) + at, sum);
    });
  }
}

int64_t floats_a_panel(const ProductArgs& args) {
  return args.dtype == Dtype::kFloat32 ? panel_floats<Float32Word>(args) : panel_floats<BFloat16Pair>(args);
}

template <class T> void product_as(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  if (few(args.n)) return product_of_few<T>(args, scratch, begin, end);
  if (!by_columns(args)) return product_by_rows<T>(args, scratch, begin, end);
  if (transposes(args)) return product_by_rows_of_b<T>(args, scratch, begin, end);
  product_by_columns<T>(args, scratch, begin, end);
}
int64_t tasks(const ProductArgs& args) {
  return by_columns(args) && !few(args.n) ? panels(args.n) : rounded_up(args.m, kRowsATask) / kRowsATask;
}

void run(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
  (args.dtype == Dtype::kFloat32 ? product_as<Float32Word> : product_as<BFloat16Pair>)(args, scratch, begin, end);
}
}  // namespace

int64_t packed_factor(const ProductArgs& args) { return few(args.n) ? 0 : panels(args.n) * floats_a_panel(args); }

void pack_factor(const ProductArgs& args, float* packed) {
  const auto pack = args.dtype == Dtype::kFloat32 ? pack_panel<Float32Word> : pack_panel<BFloat16Pair>;
  for (int64_t panel = 0; panel < panels(args.n); ++panel, packed += floats_a_panel(args)) pack(args, panel, packed);
}

int64_t product_scratch(const ProductArgs& args) {
  if (few(args.n)) return args.k * args.n;
  if (args.packed != nullptr) return 0;
  const int64_t panel = floats_a_panel(args);
  if (!by_columns(args)) return panels(args.n) * panel;
  return transposes(args) ? panels(args.m) * panel + (rows_of_b(args) * args.k + 1) / 2 : panel;
}

void product(const ProductArgs& args) {
  const int64_t count = tasks(args), scratch = product_scratch(args);
  if (count == 0) return;
  share_out(count, args.m * args.k * args.n / count / kMultiplyAddsAnElement,
            [&](int64_t begin, int64_t end) { run(args, Memory<>(scratch), begin, end); });
}

void product_of_rows(const ProductArgs& args, int64_t first, int64_t count, const void* a, float* scratch) {
  const int64_t offset = first * args.n * size_of(args.dtype);
  ProductArgs some = args;
  some.m = count, some.a = a;
  some.out = static_cast<char*>(args.out) + offset;
  if (args.residual != nullptr) some.residual = static_cast<const char*>(args.residual) + offset;
  run(some, scratch, 0, tasks(some));
}
}  // namespace raccgan::RACCGAN_TARGET
