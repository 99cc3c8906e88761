// Depthwise convolution and correlation on a CPU, in float32 sums, a vector of channels at a time.
//
// Rows of one vector's channels are first copied into scratch memory (depthwise_band.h), where they lie without gaps
// and with zeros beside every row: strides of many channels, which map to a few sets of the cache only, unaligned ends,
// channels that do not fill a vector and bfloat16 are then no concern of the loops that do the arithmetic. Those work
// on tiles of a few pixels along a row, whose sums stay in registers. What lies outside of the image is skipped, not
// multiplied by zero: at 8 x 8 pixels and k = 7 that is 38% of all products.
//
// The correlation adds float32 over one piece (depthwise.h), in an order that the shape alone decides.
#include "depthwise_band.h"

namespace raccgan {
namespace {

#if defined(__AVX512F__)
constexpr int kWideTile = 8;  // with 32 registers
#else
constexpr int kWideTile = 4;
#endif

// ---- convolution -------------------------------------------------------------------------------------------------

// sums[t] += the products of a row of k weights with kPixels + k - 1 columns of x. kLeft and kRight say that x begins
// or ends with k / 2 columns of zeros, which are skipped.
template <int K, int kPixels, bool kLeft, bool kRight>
inline __attribute__((always_inline)) void add_row(const float* x, const float* weights, Floats (&sums)[kPixels]) {
#pragma GCC unroll 16
  for (int at = kLeft ? K / 2 : 0; at < kPixels + (kRight ? K / 2 : K - 1); ++at) {
    const Floats column = load(x + at * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const int t = at - j;
      if (t >= 0 && t < kPixels) sums[t] = multiply_add(column, load(weights + j * kWidth), sums[t]);
    }
  }
}

// What one task of the convolution has at hand.
struct Convolution {
  const DepthwiseShape& s;
  const Lanes& l;
  const Band& band;
  const float* x;       // the band in scratch memory
  const float* packed;  // this block's bias, then its weights
};

// kPixels outputs of row h from column w on.
template <class T, int K, int kPixels, bool kLeft, bool kRight>
inline __attribute__((always_inline)) void convolve_tile(const Convolution& a, int64_t h, int64_t w,
                                                         typename T::Stored* y) {
  Floats sums[kPixels];
  const Floats bias = load(a.packed);
#pragma GCC unroll 8
  for (int t = 0; t < kPixels; ++t) __builtin_prefetch(y + (w + t) * a.s.c + ahead(a.s), 1);
#pragma GCC unroll 8
  for (int t = 0; t < kPixels; ++t) sums[t] = bias;
  const int64_t first = most(a.band.x_first, h - K / 2), last = least(a.band.x_last, h + K / 2 + 1);
  const float* x = a.x + a.band.x_row(first) + w * kWidth;
  const float* weights = a.packed + (1 + (first - h + K / 2) * K) * kWidth;
  for (int64_t row = first; row < last; ++row, x += a.band.x_width * kWidth, weights += K * kWidth) {
    add_row<K, kPixels, kLeft, kRight>(x, weights, sums);
  }
  if (full(a.l) && (kRight || w + kPixels <= a.s.w)) {
#pragma GCC unroll 8
    for (int t = 0; t < kPixels; ++t) T::store(y + (w + t) * a.s.c, sums[t]);
    return;
  }
  for (int t = 0; t < kPixels && w + t < a.s.w; ++t) {
    store_lanes<T>(y + (w + t) * a.s.c, sums[t], a.l, a.s.h * a.s.w * a.s.c);
  }
}

// Row h. kExact: the width is a multiple of kTile, so that the last tile ends where the image does.
template <class T, int K, bool kExact>
void convolve_row(const Convolution& a, int64_t h, typename T::Stored* y) {
  const int64_t width = a.band.width;
  int64_t w = 0;
  if (width == kTile) return convolve_tile<T, K, kTile, true, kExact>(a, h, w, y);
  if (width == kWideTile) return convolve_tile<T, K, kWideTile, true, kExact>(a, h, w, y);
  convolve_tile<T, K, kWideTile, true, false>(a, h, w, y);
  for (w = kWideTile; w + kWideTile < width; w += kWideTile) convolve_tile<T, K, kWideTile, false, false>(a, h, w, y);
  if (w + kWideTile == width) return convolve_tile<T, K, kWideTile, false, kExact>(a, h, w, y);
  convolve_tile<T, K, kTile, false, kExact>(a, h, w, y);
}

template <class T, int K>
void convolve_as(const ConvolutionArgs& args, float* scratch, int64_t begin, int64_t end) {
  const DepthwiseShape& s = args.shape;
  const int64_t blocks = channel_blocks(s), group = samples_a_vector(s);
  const auto row = s.w % kTile == 0 ? convolve_row<T, K, true> : convolve_row<T, K, false>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = i % blocks;
    const Lanes l = lanes_of(s, block, i / blocks / bands(s) * group, s.n);
    const Band band(s, i / blocks % bands(s));
    const Convolution a{s, l, band, scratch, args.packed + block * (1 + K * K) * kWidth};
    auto* const y = static_cast<typename T::Stored*>(args.y) + l.sample * s.h * s.w * s.c + l.channel;
    int64_t copied = band.x_first;
    for (int64_t h = band.first; h < band.last; ++h) {
      const int64_t needed = least(band.x_last, h + K / 2 + 1);
      copy_rows<T>(args.x, s, l, copied, needed, K / 2, band.x_width, scratch + band.x_row(copied));
      copied = needed;
      row(a, h, y + h * s.w * s.c);
    }
  }
}

// Each block of channels: a vector of biases, then one for each weight; all samples in a vector have the same.
template <class T>
void pack_weights_as(const DepthwiseShape& s, const void* w, const void* b, float* packed) {
  const int64_t size = s.k * s.k;
  for (int64_t block = 0; block < channel_blocks(s); ++block, packed += (1 + size) * kWidth) {
    const Lanes l = lanes_of(s, block, 0, samples_a_vector(s));
    const auto* weights = static_cast<const typename T::Stored*>(w) + l.channel * size;
    store(packed, b == nullptr ? Floats{} : load_lanes<T>(static_cast<const typename T::Stored*>(b) + l.channel, l, 0));
    for (int64_t i = 0; i < size; ++i) {
      typename T::Stored lanes[kWidth] = {};
      for (int64_t lane = 0; lane < l.samples * l.channels; ++lane) lanes[lane] = weights[lane % l.channels * size + i];
      store(packed + (1 + i) * kWidth, T::load(lanes));
    }
  }
}

// ---- correlation -------------------------------------------------------------------------------------------------

// So many sums side by side for each product with a shifted x, so that additions need not wait for each other.
template <int K>
constexpr int kChains = K * 2 <= (kMaxLanes == kWidth ? 16 : 10) ? 2 : 1;

template <int K>
using Sums = Floats[kChains<K>][K];

// sums[.][j] += x[t + j] g[t] over the kTile pixels t. kLeft, kRight as in add_row.
template <int K, bool kLeft, bool kRight>
inline __attribute__((always_inline)) void add_products(const float* x, const float* g, Sums<K>& sums) {
  Floats pixels[kTile];
#pragma GCC unroll 4
  for (int t = 0; t < kTile; ++t) pixels[t] = load(g + t * kWidth);
#pragma GCC unroll 16
  for (int at = kLeft ? K / 2 : 0; at < kTile + (kRight ? K / 2 : K - 1); ++at) {
    const Floats column = load(x + at * kWidth);
#pragma GCC unroll 4
    for (int t = 0; t < kTile; ++t) {
      const int j = at - t;
      Floats& sum = sums[t % kChains<K>][j >= 0 && j < K ? j : 0];
      if (j >= 0 && j < K) sum = multiply_add(column, pixels[t], sum);
    }
  }
}

// So many rows of g at a time that they and the rows of x around them stay in the first-level cache.
int64_t rows_a_strip(const Band& band, int64_t k) {
  constexpr int64_t kVectors = 24576 / kBytes;
  return most(1, (kVectors - (k - 1) * band.x_width) / (band.x_width + band.width));
}

// totals[j] += the products of `rows` rows of x, shifted by j columns, with as many of g.
template <int K, bool kExact>
void correlate_rows(const float* x, const float* g, int64_t rows, const Band& band, float* totals) {
  Sums<K> sums;
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) {
    sums[0][j] = load(totals + j * kWidth);
    if (kChains<K> > 1) sums[kChains<K> - 1][j] = Floats{};
  }
  for (; rows > 0; --rows, x += band.x_width * kWidth, g += band.width * kWidth) {
    if (band.width == kTile) {
      add_products<K, true, kExact>(x, g, sums);
      continue;
    }
    add_products<K, true, false>(x, g, sums);
    int64_t w = kTile;
    for (; w + kTile < band.width; w += kTile) add_products<K, false, false>(x + w * kWidth, g + w * kWidth, sums);
    add_products<K, false, kExact>(x + w * kWidth, g + w * kWidth, sums);
  }
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j) {
    store(totals + j * kWidth, kChains<K> > 1 ? sums[0][j] + sums[kChains<K> - 1][j] : sums[0][j]);
  }
}

// partial[i, c] = the sum of the lanes that hold channel c.
void write_partial(const float* totals, const DepthwiseShape& s, int64_t block, float* partial) {
  const int64_t channels = lanes_of(s, block, 0, 1).channels;
  for (int64_t i = 0; i < s.k * s.k; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      float sum = 0;
      for (int64_t n = 0; n < samples_a_vector(s); ++n) sum += totals[i * kWidth + n * channels + c];
      partial[i * s.c + block * kWidth + c] = sum;
    }
  }
}

template <class T, int K>
void correlate_as(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end) {
  const DepthwiseShape& s = args.shape;
  const int64_t blocks = channel_blocks(s);
  const auto rows = s.w % kTile == 0 ? correlate_rows<K, true> : correlate_rows<K, false>;
  float* const totals = scratch;
  float* const x = totals + K * K * kWidth;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = i % blocks, piece = i / blocks;
    const Band band(s, piece % bands(s));
    float* const g = x + band.x_row(band.x_last);
    const int64_t strip = rows_a_strip(band, K);
    for (int64_t j = 0; j < K * K; ++j) store(totals + j * kWidth, Floats{});
    const int64_t sample = piece / bands(s) * samples_a_piece(s), end_sample = least(s.n, sample + samples_a_piece(s));
    for (int64_t n = sample; n < end_sample; n += samples_a_vector(s)) {
      const Lanes l = lanes_of(s, block, n, end_sample);
      int64_t copied = band.x_first;
      for (int64_t h = band.first; h < band.last; h += strip) {
        const int64_t end_h = least(band.last, h + strip), needed = least(band.x_last, end_h + K / 2);
        copy_rows<T>(args.x, s, l, copied, needed, K / 2, band.x_width, x + band.x_row(copied));
        copy_rows<T>(args.g, s, l, h, end_h, 0, band.width, g + band.out_row(h));
        copied = needed;
        for (int64_t i = 0; i < K; ++i) {
          const int64_t first = most(h, K / 2 - i), last = least(end_h, s.h + K / 2 - i);
          if (first >= last) continue;  // the image has no such row
          rows(x + band.x_row(first + i - K / 2), g + band.out_row(first), last - first, band, totals + i * K * kWidth);
        }
      }
    }
    write_partial(totals, s, block, args.partial + piece * K * K * s.c);
  }
}

template <class T>
auto convolve_of(int64_t k) {
  return k == 3 ? convolve_as<T, 3> : k == 5 ? convolve_as<T, 5> : convolve_as<T, 7>;
}

template <class T>
auto correlate_of(int64_t k) {
  return k == 3 ? correlate_as<T, 3> : k == 5 ? correlate_as<T, 5> : correlate_as<T, 7>;
}

}  // namespace

namespace RACCGAN_TARGET {

int64_t packed_floats(const DepthwiseShape& shape) {
  return channel_blocks(shape) * (1 + shape.k * shape.k) * kWidth;
}

void pack_weights(const DepthwiseShape& shape, const void* w, const void* b, float* packed) {
  return shape.dtype == Dtype::kFloat32 ? pack_weights_as<Float32>(shape, w, b, packed)
                                        : pack_weights_as<BFloat16>(shape, w, b, packed);
}

int64_t convolution_tasks(const DepthwiseShape& shape) {
  const int64_t group = samples_a_vector(shape);
  return rounded_up(shape.n, group) / group * bands(shape) * channel_blocks(shape);
}

void convolve(const ConvolutionArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t k = args.shape.k;
  const auto run = args.shape.dtype == Dtype::kFloat32 ? convolve_of<Float32>(k) : convolve_of<BFloat16>(k);
  run(args, scratch, begin, end);
}

int64_t correlation_tasks(const DepthwiseShape& shape) { return correlation_pieces(shape) * channel_blocks(shape); }

void correlate(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t k = args.shape.k;
  const auto run = args.shape.dtype == Dtype::kFloat32 ? correlate_of<Float32>(k) : correlate_of<BFloat16>(k);
  run(args, scratch, begin, end);
}

}  // namespace RACCGAN_TARGET
}  // namespace raccgan
