// The gradient of a pointwise convolution's weight: few rows and columns, and all pixels to add up.
#include "../kernels.h"
#include "../threads.h"
#include "tiles.h"

namespace raccgan::RACCGAN_TARGET {
namespace {
// Pixels whose sum is float32, by the shape alone, never by threads or hardware: the sum over chunks is always the same.
constexpr int64_t kChunk = 4096;
constexpr int64_t kBlock = 256;  // pixels whose panel stays in the first-level cache

// a of a block of pixels: in place, or packed into words.
template <class T> struct LeftOperand {
  const typename T::Stored* at;
  int64_t row, step;  // from one i to the next, from one word of pixels to the next

  LeftOperand(const typename T::Stored* a, int64_t pixels, int64_t i, float* scratch) {
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

template <class T> int64_t left_floats(int64_t i) {
  return T::kTogether == 1 ? 0 : kBlock / T::kTogether * rounded_up(i, kWidth);
}

// A chunk's product in memory.
struct Output {
  float* data;
  int64_t row, column;  // from one to the next

  // [i, j + lane] += sum
  template <class Lanes> RACCGAN_INLINE void add(int64_t i, int64_t j, const Lanes& lanes, Floats sum) const {
    float* const to = data + i * row + j * column;
    if (column == 1) return lanes.store(to, lanes.load(to) + sum);
    float numbers[kWidth] = {};
    lanes.store(numbers, sum);
    for (int64_t lane = 0; lane < lanes.size(); ++lane) to[lane * column] += numbers[lane];
  }
};

// The block of pixels from `first` on, which is prefetched evenly while this block passes all panels.
struct NextBlock {
  int64_t first, panel, panels;  // panel: the one that this block passes now
};

// out[i, .] += the sums over a block of pixels, in the panel of columns that begins at `column`.
template <class T>
void correlation_panel(const CorrelationArgs& args, const LeftOperand<T>& a, int64_t pixels, const float* packed,
                       int64_t column, const Output& out, const NextBlock& next) {
  const int64_t columns = least(kPanel, args.j - column), next_pixels = least(kBlock, args.m - next.first);
  // The share of the next block, of so many channels, that `more` rows are of all rows of all panels.
  const auto fetch_part = [&](const void* from, int64_t channels, int64_t row, int64_t more) RACCGAN_INLINE {
    const int64_t bytes = next_pixels * channels * sizeof(typename T::Stored), all = next.panels * args.i;
    const int64_t done = next.panel * args.i + row, begin = done * bytes / all;
    fetch(static_cast<const typename T::Stored*>(from) + next.first * channels + begin / sizeof(typename T::Stored),
          (done + more) * bytes / all - begin);
  };
  for_rows(0, args.i, [&](int64_t i, auto rows) RACCGAN_INLINE {
    fetch_part(args.a, args.i, i, rows.count);
    fetch_part(args.b, args.j, i, rows.count);
    Floats sums[rows.count][kVectors] = {};
    add_products<T>(a.at + i * a.row, a.row, a.step, packed, rounded_up(pixels, T::kTogether), sums);
#pragma GCC unroll 8
    for (int r = 0; r < rows.count; ++r) {
      for_vectors<kVectors>(columns, [&](auto lanes, int v)
                                         RACCGAN_INLINE { out.add(i + r, column + v * kWidth, lanes, sums[r][v]); });
    }
  });
}

// sums[i] += the sum over the pixels of a.
template <class T> void add_up_pixels(const typename T::Stored* a, int64_t pixels, int64_t i, float* sums) {
  for_lanes(i, [&](auto lanes, int64_t at) RACCGAN_INLINE {
    Floats sum{};
    for (int64_t m = 0; m < pixels; ++m) sum += lanes.template load<T>(a + m * i + at);
    lanes.store(sums + at, lanes.load(sums + at) + sum);
  });
}

// With a and b exchanged where b's few columns would leave a panel nearly empty.
CorrelationArgs few_as_rows(const CorrelationArgs& args) {
  CorrelationArgs other = args;
  if (few(args.j)) other.i = args.j, other.a = args.b, other.j = args.i, other.b = args.a;
  return other;
}

// The panels first_panel <= i < first_panel + count of a chunk.
template <class T>
void correlate_chunk(const CorrelationArgs& given, int64_t chunk, int64_t first_panel, int64_t count, float* scratch) {
  using Stored = typename T::Stored;
  const CorrelationArgs args = few_as_rows(given);
  const auto *const a = static_cast<const Stored*>(args.a), *const b = static_cast<const Stored*>(args.b);
  float* const packed = scratch + left_floats<T>(args.i);
  float* const data = args.out + chunk * args.i * args.j;
  const Output out = few(given.j) ? Output{data, 1, given.j} : Output{data, args.j, 1};
  const int64_t first_column = first_panel * kPanel, last_column = least(args.j, (first_panel + count) * kPanel);
  for (int64_t i = 0; i < args.i; ++i) {
    for (int64_t j = first_column; j < last_column; ++j) data[i * out.row + j * out.column] = 0;
  }
  float* const sums = args.sums != nullptr && first_panel == 0 ? args.sums + chunk * given.i : nullptr;
  if (sums != nullptr) memset(sums, 0, given.i * sizeof *sums);
  const int64_t last = least(args.m, (chunk + 1) * kChunk);
  for (int64_t m = chunk * kChunk; m < last; m += kBlock) {
    const int64_t pixels = least(kBlock, last - m);
    if (sums != nullptr) add_up_pixels<T>(static_cast<const Stored*>(given.a) + m * given.i, pixels, given.i, sums);
    const LeftOperand<T> left(a + m * args.i, pixels, args.i, scratch);
    for (int64_t panel = 0; panel < count; ++panel) {
      const int64_t column = first_column + panel * kPanel;
      pack<T, T>(b + m * args.j + column, args.j, pixels, least(kPanel, args.j - column), packed);
      correlation_panel<T>(args, left, pixels, packed, column, out, {m + pixels, panel, count});
    }
  }
}

template <class T> void correlation_as(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t across = panels(few_as_rows(args).j);
  for (int64_t count; begin < end; begin += count) {
    count = least(across - begin % across, end - begin);
    correlate_chunk<T>(args, begin / across, begin % across, count, scratch);
  }
}
void correlate(const CorrelationArgs& args, int64_t chunks) {
  const int64_t tasks = chunks * panels(few_as_rows(args).j), i = few_as_rows(args).i;
  if (tasks == 0) return;
  const bool pairs = args.dtype == Dtype::kBFloat16;
  const auto run = pairs ? correlation_as<BFloat16Pair> : correlation_as<Float32Word>;
  const int64_t scratch = pairs ? left_floats<BFloat16Pair>(i) + kBlock / 2 * kPanel : kBlock * kPanel;
  share_out(tasks, args.m * args.i * args.j / tasks / kMultiplyAddsAnElement,
            [&](int64_t begin, int64_t end) { run(args, Memory<>(scratch), begin, end); });
}
}  // namespace

void correlation(const CorrelationArgs& args) {
  const int64_t chunks = rounded_up(args.m, kChunk) / kChunk, size = args.i * args.j;
  if (chunks == 1) return correlate(args, 1);
  const bool sums = args.sums != nullptr;
  const Memory<> products(chunks * size), partial_sums(sums ? chunks * args.i : 0);
  CorrelationArgs partial = args;
  partial.out = products;
  if (sums) partial.sums = partial_sums;
  correlate(partial, chunks);
  add_up(products, chunks, size, args.out);
  if (sums) add_up(partial_sums, chunks, args.i, args.sums);
}
}  // namespace raccgan::RACCGAN_TARGET
