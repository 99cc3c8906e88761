// The forward pass of a depthwise-separable convolution in one kernel: the depthwise results of a tile stay in shared
// memory, where they are the left operand of a matrix product on the tensor cores.
//
//     y = (L relu(z scale + shift)) W^T + bias + residual, in the notation of depthwise_separable.cu
//
// Compiled for the architectures in setup.py and run in emulation (emulation.h), but not yet run on a GPU: no speed is
// claimed for it.
//
// A block has a tile of one sample's results and up to 128 of their channels, whose sums it keeps in registers. It goes
// through the channels of x by 32: while the part of W that belongs to them is on its way into shared memory, it
// convolves them as depthwise_tiles.h does and writes the results beside it, rounded to what the product takes.
#include "depthwise_images.h"
#include "tensor_cores.h"

namespace raccgan {
namespace cuda {
namespace {

// ---- the matrix --------------------------------------------------------------------------------------------------

constexpr int kTileWidth = 8;                   // columns of a product's result
constexpr int kColumnTiles = 128 / kTileWidth;  // at most, a block
constexpr int kStepWords = 8;                   // 4-byte words of a row that a product takes
constexpr int kStatistics = 3;                  // sum, sum of squares, max

// A row of 32 channels.
template <class T>
struct Row {
  static constexpr int kElements = 4 / sizeof(typename T::Stored);  // a word
  static constexpr int kWords = kWarp / kElements, kSteps = kWords / kStepWords;
  static constexpr int kPitch = kWords + 4;  // in shared memory: no two of a product's 8 rows and 4 words share a bank
};

// The columns of W that the blocks of a tile share out, by tiles of kTileWidth.
struct ColumnShare {
  int64_t blocks, each;

  __host__ __device__ explicit ColumnShare(int64_t d)
      : blocks(ceiling(d, kColumnTiles * kTileWidth)), each(ceiling(ceiling(d, kTileWidth), blocks)) {}
};

// Words of W, packed [chunks of 32 channels, tiles of columns, steps / 2, lanes, 4]: a lane's operand of two steps lies
// together, and all that a block needs of a chunk. Zero beyond C and D.
template <class T>
int64_t matrix_words(const FusedArgs& args) {
  const ColumnShare columns(args.d);
  return ceiling(args.layer.c, kWarp) * columns.blocks * columns.each * kTileWidth * Row<T>::kWords;
}

template <class T>
__global__ void __launch_bounds__(kThreads) pack_matrix(FusedArgs args, int64_t words, unsigned* packed) {
  using Shape = Row<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  const ColumnShare columns(args.d);
  const int part = i % 4, lane = i / 4 % kWarp;
  const int64_t pair = i / (4 * kWarp) % (Shape::kSteps / 2), tile = i / (kTileWidth * Shape::kWords);
  const int64_t word = (2 * pair + part / 2) * kStepWords + lane % 4 + part % 2 * 4;
  const int64_t channel = tile / (columns.blocks * columns.each) * kWarp + word * Shape::kElements;
  const int64_t d = tile % (columns.blocks * columns.each) * kTileWidth + lane / 4;
  const auto* const from = static_cast<const typename T::Stored*>(args.pointwise);
  union {
    unsigned word;
    typename T::Stored elements[Shape::kElements];
  } to;
#pragma unroll
  for (int e = 0; e < Shape::kElements; ++e) {
    const bool there = d < args.d && channel + e < args.layer.c;
    to.elements[e] = there ? from[d * args.layer.c + channel + e] : T::narrow(0.0f);
  }
  packed[i] = to.word;
}

// ---- a tile ------------------------------------------------------------------------------------------------------

struct SeparateArgs {
  FusedArgs call;
  Norm norm;
  bool wide;              // whether x allows 16-byte loads
  const float* packed;    // the depthwise weights
  const unsigned* matrix;
  int64_t rows, columns;  // of the result
  float* partial;         // [N, tiles, kStatistics, D], or null
};

template <class T, int K, Form kForm>
struct Shared {
  using Shape = Tile<K, kForm>;
  static constexpr int kPixels = Shape::kWarps * Shape::kStrip;
  alignas(16) float tile[Shape::kRows * Shape::kColumns * kWarp];
  alignas(16) float weights[Shape::kTaps * Shape::kTaps * kWarp];
  alignas(16) Coefficients by;
  alignas(16) unsigned left[kPixels * Row<T>::kPitch];
  alignas(16) unsigned right[kColumnTiles * kTileWidth * Row<T>::kWords];
};

// The least that a GPU of compute capability 8.0 or later gives to a block.
constexpr int kSharedLimit = 99 * 1024;

// A warp's part of the product: 16 of the tile's pixels, and every kEvery-th tile of columns from `first` on.
template <class T, int K, Form kForm>
struct Part {
  using Shape = Tile<K, kForm>;
  static constexpr int kRows = Shape::kWarps * Shape::kStrip / 16, kEvery = Shape::kWarps / kRows;
  static constexpr int kTiles = kColumnTiles / kEvery;
  static_assert(kRows * kEvery == Shape::kWarps && kTiles * kEvery == kColumnTiles);

  int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp % kRows, first = threadIdx.x / kWarp / kRows;

  // Of the block's, the pixel and the column of the lane's number `at` of a result.
  __device__ int pixel(int at) const { return row * 16 + lane / 4 + at / 2 * 8; }
  __device__ int column(int i, int at) const { return (first + i * kEvery) * kTileWidth + lane % 4 * 2 + at % 2; }
};

// sums += left right, `tiles` tiles of columns.
template <class T, class Part>
__device__ void multiply(const Part& part, bool tf32, int tiles, const unsigned* left, const unsigned* right,
                         float (&sums)[Part::kTiles][4]) {
  using Shape = Row<T>;
  left += (part.row * 16 + part.lane / 4) * Shape::kPitch + part.lane % 4;
#pragma unroll
  for (int pair = 0; pair < Shape::kSteps / 2; ++pair) {
    unsigned a[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[step][i] = left[i % 2 * 8 * Shape::kPitch + (2 * pair + step) * kStepWords + i / 2 * 4];
      }
    }
#pragma unroll
    for (int i = 0; i < Part::kTiles; ++i) {
      const int tile = part.first + i * Part::kEvery;
      if (tile >= tiles) break;
      const uint4 b = *as_vector(right + ((tile * (Shape::kSteps / 2) + pair) * kWarp + part.lane) * 4);
      const unsigned b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
      multiply(T{}, tf32, a[0], b_first, sums[i]);
      multiply(T{}, tf32, a[1], b_second, sums[i]);
    }
  }
}

// ---- the result --------------------------------------------------------------------------------------------------

// amax's: NaN stays NaN.
inline __device__ float larger(float a, float b) { return a > b || a != a ? a : b; }

inline __device__ float combined(int statistic, float a, float b) { return statistic == 2 ? larger(a, b) : a + b; }

// Adds bias and residual and writes what lies inside of the image; leaves in `sums` what was written.
template <class T, class Part>
__device__ void finish(const SeparateArgs& args, const Part& part, int64_t n, int64_t first_row, int64_t first_column,
                       int64_t first_d, int columns, float (&sums)[Part::kTiles][4], bool (&inside)[2]) {
  constexpr int kStrip = Part::Shape::kStrip;
  const FusedArgs& call = args.call;
  const auto* const residual = static_cast<const typename T::Stored*>(call.residual);
  auto* const y = static_cast<typename T::Stored*>(call.y);
  int64_t to[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int pixel = part.pixel(2 * half);
    const int64_t row = first_row + pixel / kStrip, column = first_column + pixel % kStrip;
    inside[half] = row < args.rows && column < args.columns;
    to[half] = ((n * args.rows + row) * args.columns + column) * call.d + first_d;
  }
#pragma unroll
  for (int i = 0; i < Part::kTiles; ++i) {
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const int d = part.column(i, at);
      if (d >= columns || !inside[at / 2]) continue;
      float v = sums[i][at];
      if (call.bias) v += call.bias[first_d + d];
      if (residual) v += T::widen(residual[to[at / 2] + d]);
      const auto stored = T::narrow(v);
      y[to[at / 2] + d] = stored;
      sums[i][at] = T::widen(stored);
    }
  }
}

// The block's statistics of what `finish` left, by way of `shared` [Part::kRows][kColumnTiles * kTileWidth].
template <class Part>
__device__ void summarise(const Part& part, const float (&sums)[Part::kTiles][4], const bool (&inside)[2], int columns,
                          int64_t d, float* shared, float* to) {
  constexpr int kWidth = kColumnTiles * kTileWidth;
  for (int statistic = 0; statistic < kStatistics; ++statistic) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Part::kTiles; ++i) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float v = statistic == 2 ? -INFINITY : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float one = sums[i][2 * half + side];
          if (inside[half]) v = combined(statistic, v, statistic == 1 ? one * one : one);
        }
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2) {
          v = combined(statistic, v, __shfl_xor_sync(0xffffffff, v, offset));
        }
        if (part.lane < 4) shared[part.row * kWidth + part.column(i, side)] = v;
      }
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < columns) {
      float v = shared[threadIdx.x];
      for (int row = 1; row < Part::kRows; ++row) v = combined(statistic, v, shared[row * kWidth + threadIdx.x]);
      to[statistic * d + threadIdx.x] = v;
    }
  }
}

// A block of columns, a tile and a sample.
template <class T, int K, Form kForm>
__global__ void __launch_bounds__(Tile<K, kForm>::kWarps* kWarp) separate(SeparateArgs args) {
  using Shape = Tile<K, kForm>;
  constexpr int kBlock = Shape::kWarps * kWarp, kTaps = Shape::kTaps;
  auto& shared = *static_cast<Shared<T, K, kForm>*>(launched_shared());
  const DepthwiseLayer& s = args.call.layer;
  const Image in{Reading::kActivated, args.call.x, nullptr, s.h, s.w};  // here, so that other readings are left out
  const ColumnShare share(args.call.d);
  const int64_t across = ceiling(args.columns, Shape::kStrip), tiles = ceiling(args.rows, Shape::kWarps) * across;
  const int64_t block = blockIdx.x % share.blocks, at = blockIdx.x / share.blocks % tiles;
  const int64_t n = blockIdx.x / share.blocks / tiles;
  const int64_t first_row = at / across * Shape::kWarps, first_column = at % across * Shape::kStrip;
  const int column_tiles = static_cast<int>(share.each), vectors = column_tiles * kTileWidth * Row<T>::kWords / 4;

  const Part<T, K, kForm> part;
  float sums[Part<T, K, kForm>::kTiles][4] = {};
  const int lane = threadIdx.x % kWarp;
  for (int64_t chunk = 0; chunk * kWarp < s.c; ++chunk) {
    const unsigned* const from = args.matrix + (chunk * share.blocks + block) * vectors * 4;
    for (int i = threadIdx.x; i < vectors; i += kBlock) copy_async(shared.right + 4 * i, from + 4 * i);

    const int64_t channel = chunk * kWarp + lane;
    find(s, args.norm, n, chunk, shared.by);
    for (int i = threadIdx.x; i < kTaps * kTaps * kWarp; i += kBlock) {
      shared.weights[i] = channel < s.c ? args.packed[i / kWarp * s.c + channel] : 0.0f;
    }
    __syncthreads();
    const int64_t in_row = Shape::first(first_row), in_column = Shape::first(first_column);
    if (args.wide) {
      fill<T, kVector<T>, Shape::kRows, Shape::kColumns, kBlock>(s, in, shared.by, n, chunk, in_row, in_column,
                                                                 shared.tile);
    } else {
      fill<T, 1, Shape::kRows, Shape::kColumns, kBlock>(s, in, shared.by, n, chunk, in_row, in_column, shared.tile);
    }
    __syncthreads();
    float strip[Shape::kStrip] = {};
    convolve_row<K, kForm>(shared.tile, shared.weights, strip);
    auto* const left = reinterpret_cast<typename T::Stored*>(shared.left) + lane;
    const int first_pixel = threadIdx.x / kWarp * Shape::kStrip;
#pragma unroll
    for (int i = 0; i < Shape::kStrip; ++i) {
      left[(first_pixel + i) * Row<T>::kPitch * Row<T>::kElements] = T::narrow(strip[i]);
    }
    wait_for_copies();
    __syncthreads();
    multiply<T>(part, args.call.tf32, column_tiles, shared.left, shared.right, sums);
    __syncthreads();  // before the next chunk takes the place of this one
  }

  const int64_t first_d = block * share.each * kTileWidth, left_over = args.call.d - first_d;
  const int columns = static_cast<int>(left_over < share.each * kTileWidth ? left_over : share.each * kTileWidth);
  bool inside[2];
  finish<T>(args, part, n, first_row, first_column, first_d, columns, sums, inside);
  if (!args.partial) return;
  float* const to = args.partial + (n * tiles + at) * kStatistics * args.call.d + first_d;
  summarise(part, sums, inside, columns, args.call.d, shared.tile, to);
}

// sum, sum of squares and max [N, D] each, from partial [N, pieces, kStatistics, D].
__global__ void __launch_bounds__(kThreads) finish_statistics(FusedArgs args, int64_t pieces, const float* partial) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.layer.n * args.d) return;
  const float* from = partial + i / args.d * pieces * kStatistics * args.d + i % args.d;
  double sum = 0.0, squares = 0.0;
  float largest = -INFINITY;
  for (int64_t piece = 0; piece < pieces; ++piece, from += kStatistics * args.d) {
    sum += from[0];
    squares += from[args.d];
    largest = larger(largest, from[2 * args.d]);
  }
  args.sum[i] = static_cast<float>(sum);
  args.squares[i] = static_cast<float>(squares);
  args.largest[i] = largest;
}

// ---- host --------------------------------------------------------------------------------------------------------

template <class T, int K, Form kForm>
void separate_as(Queue& queue, const SeparateArgs& args) {
  using Memory = Shared<T, K, kForm>;
  static_assert(sizeof(Memory) <= kSharedLimit);
  static_assert(sizeof(Memory::tile) >= sizeof(float) * Part<T, K, kForm>::kRows * kColumnTiles * kTileWidth);
  const int64_t all = args.call.layer.n * tiles(kForm, args.rows, args.columns) * ColumnShare(args.call.d).blocks;
  queue.with_shared(sizeof(Memory), separate<T, K, kForm>, all, Tile<K, kForm>::kWarps * kWarp, args);
}

template <class T, int K>
void separate_as(Queue& queue, Form form, const SeparateArgs& args) {
  switch (form) {
    case Form::kPlain: separate_as<T, K, Form::kPlain>(queue, args); break;
    case Form::kDown: separate_as<T, K, Form::kDown>(queue, args); break;
    case Form::kUp: separate_as<T, K, Form::kUp>(queue, args); break;
  }
}

int64_t tiles_of(const DepthwiseLayer& s) { return tiles(form_of(s.resize, false), s.out(s.h), s.out(s.w)); }

// The scratch memory of the pass; only what it needs has a place.
struct Workspace {
  float *mean, *var, *moments, *packed, *matrix, *partial;
  int64_t words = 0, floats = 0;

  Workspace(const FusedArgs& args, float* memory) {
    const DepthwiseLayer& s = args.layer;
    for_dtype(s.dtype, [&](auto element) { words = matrix_words<decltype(element)>(args); });
    const auto next = [&](bool needed, int64_t count) {
      const int64_t at = floats;
      floats += needed ? ceiling(count, 4) * 4 : 0;  // each on a 16-byte boundary
      return needed && memory ? memory + at : nullptr;
    };
    mean = next(s.normalise, s.n * s.c);
    var = next(s.normalise, s.n * s.c);
    moments = next(s.normalise, moments_floats(runs_of(s, nullptr)));
    packed = next(true, taps(s) * taps(s) * s.c);
    matrix = next(true, words);
    partial = next(args.sum != nullptr, s.n * tiles_of(s) * kStatistics * args.d);
  }
};

}  // namespace

int64_t fused_floats(const FusedArgs& args) { return Workspace(args, nullptr).floats; }

const char* fused(const FusedArgs& args, float* scratch, int device, void* stream) {
  const DepthwiseLayer& s = args.layer;
  Queue queue(device, stream);
  const Workspace work(args, scratch);
  auto* const matrix = reinterpret_cast<unsigned*>(work.matrix);
  if (s.normalise) queue.take(moments(runs_of(s, args.x), work.moments, work.mean, work.var, device, stream));
  queue(pack, ceiling(taps(s) * taps(s) * s.c, kThreads), kThreads, s, false, work.packed);
  for_vectors(s.dtype, s.c, [&](auto element, auto vector) {
    using T = decltype(element);
    queue(pack_matrix<T>, ceiling(work.words, kThreads), kThreads, args, work.words, matrix);
    const SeparateArgs all{args, {work.mean, work.var, nullptr, nullptr}, decltype(vector)::width > 1, work.packed,
                           matrix, s.out(s.h), s.out(s.w), work.partial};
    for_size(s.k, [&](auto k) { separate_as<T, decltype(k)::value>(queue, form_of(s.resize, false), all); });
  }, args.x);
  if (args.sum) queue(finish_statistics, ceiling(s.n * args.d, kThreads), kThreads, args, tiles_of(s), work.partial);
  return queue.error();
}

}  // namespace cuda
}  // namespace raccgan
