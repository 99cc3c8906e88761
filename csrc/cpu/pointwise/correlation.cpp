// The gradient of a pointwise convolution's weight: few rows and columns, and all pixels to add up.
#include "pointwise.h"

#include "tiles.h"

namespace raccgan {
namespace {

constexpr int64_t kBlock = 256;  // pixels whose panel stays in the first-level cache

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
CorrelationArgs few_as_rows(const CorrelationArgs& args) {
  CorrelationArgs other = args;
  if (few(args.j)) other.i = args.j, other.a = args.b, other.j = args.i, other.b = args.a;
  return other;
}

template <class T>
void correlation_as(const CorrelationArgs& given, float* scratch, int64_t begin, int64_t end) {
  using Stored = typename T::Stored;
  const CorrelationArgs args = few_as_rows(given);
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

int64_t correlation_tasks(const CorrelationArgs& args) {
  return correlation_pieces(args.m) * panels(few_as_rows(args).j);
}

int64_t correlation_scratch(const CorrelationArgs& given) {
  const CorrelationArgs args = few_as_rows(given);
  return args.dtype == Dtype::kFloat32 ? factor_floats<Single>(args.i) + kBlock * kPanel
                                       : factor_floats<Pair>(args.i) + kBlock / 2 * kPanel;
}

void correlation(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end) {
  const auto run = args.dtype == Dtype::kFloat32 ? correlation_as<Single> : correlation_as<Pair>;
  run(args, scratch, begin, end);
}

}  // namespace RACCGAN_TARGET
}  // namespace raccgan
