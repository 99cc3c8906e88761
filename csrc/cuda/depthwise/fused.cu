// The forward pass of a depthwise-separable convolution in one kernel: the depthwise results of a tile stay in shared
// memory, where they are the left operand of a matrix product on the tensor cores.
//
//     y = (L a) W^T + bias + residual, in the notation of ops/depthwise.h
//
// Not yet run on a GPU.
// A block has a tile of one sample's results and up to 128 of their channels, whose sums it keeps in registers. It goes
// through the channels of x by 32: while it copies their part of W into shared memory, it convolves them as tiles.h
// does and writes the results beside that, rounded to the product's operands. A warp multiplies its own results of the
// convolution. In the epilogue each warp transposes its sums in shared memory, so that residual and result move 16
// bytes at a time.
#include "../common/tensor_cores.h"
#include "images.h"

namespace raccgan::cuda {
namespace {
constexpr int kTileWidth = 8;  // columns of a product's result
constexpr int kMostTiles = 128 / kTileWidth;  // a block's, of columns
constexpr int kStepWords = 8;  // 4-byte words of a row that a product takes

// A row of 32 channels.
template <class T> struct Row {
  static constexpr int kElements = 4 / sizeof(typename T::Stored);  // a word
  static constexpr int kWords = kWarp / kElements, kSteps = kWords / kStepWords;
  static constexpr int kPitch = kWords + 4;  // in shared memory: a product's 8 rows and 4 words have no bank conflict
};

// The columns of W, split evenly over the blocks of a tile, by tiles of kTileWidth.
struct ColumnBlocks {
  int64_t blocks, each;

  __host__ __device__ explicit ColumnBlocks(int64_t d)
      : blocks(ceiling(d, kMostTiles * kTileWidth)), each(ceiling(ceiling(d, kTileWidth), blocks)) {}
};

// Words of W, packed [chunks of 32 channels, tiles of columns, steps / 2, lanes, 4]: a lane's operand of two steps lies
// together, and all that a block needs of a chunk. Zero beyond C and D.
template <class T> int64_t matrix_words(const FusedArgs& args) {
  const ColumnBlocks columns(args.d);
  return ceiling(args.layer.c, kWarp) * columns.blocks * columns.each * kTileWidth * Row<T>::kWords;
}

template <class T>
__global__ void __launch_bounds__(kThreads) pack_matrix(FusedArgs args, int64_t words, unsigned* packed) {
  using Shape = Row<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  const ColumnBlocks columns(args.d);
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

struct SeparateArgs {
  FusedArgs call;
  Norm norm;
  bool wide, wide_result;  // whether x, and whether y and the residual, allow 16-byte loads
  const float* packed;  // the depthwise weights
  const unsigned* matrix;
  int64_t rows, columns;  // of the result
};

template <int K, Resize kResize> using Block = Tile<K, kResize, 4>;

// The sizes of a block, with sums for kTiles tiles of columns: with few, a multiprocessor has registers for a block
// more. A warp multiplies the pixels that it convolves, by 16, with all columns.
template <int K, Resize kResize, int kTiles> struct Plan {
  using Shape = Block<K, kResize>;
  static constexpr int kThreads = Shape::kWarps * kWarp, kColumnTiles = kTiles, kColumns = kTiles * kTileWidth;
  static constexpr int kPixels = kThreadRows * Shape::kWide, kRowTiles = kPixels / 16;  // a warp's
  static_assert(kRowTiles * 16 == kPixels);
  using Sums = float[kRowTiles][kTiles][4];
  // 16 pixels of all columns, transposed by a warp: rows that it writes together have no bank conflict.
  using Rows16 = float[16][kColumns + 8];
};

template <class T, class Plan> struct ProductOperands {
  Operands<typename Plan::Shape> depthwise;
  alignas(16) unsigned left[Plan::Shape::kWarps * Plan::kPixels * Row<T>::kPitch];
  alignas(16) unsigned right[Plan::kColumns * Row<T>::kWords];
};

template <class T, class Plan> union Shared {
  ProductOperands<T, Plan> operands;
  typename Plan::Rows16 transposed[Plan::Shape::kWarps];
};

// The least that a GPU of compute capability 8.0 or later gives to a block.
constexpr int kSharedLimit = 99 * 1024;

// sums += left right, `tiles` tiles of columns; left [kPixels] rows, the warp's own.
template <class T, class Plan>
__device__ void multiply(bool tf32, int tiles, const unsigned* left, const unsigned* right, typename Plan::Sums& sums) {
  using Words = Row<T>;
  constexpr int kRowTiles = Plan::kRowTiles;
  const int lane = threadIdx.x % kWarp;
  left += lane / 4 * Words::kPitch + lane % 4;
#pragma unroll
  for (int pair = 0; pair < Words::kSteps / 2; ++pair) {
    unsigned a[kRowTiles][2][4];
#pragma unroll
    for (int row = 0; row < kRowTiles; ++row) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int step = 2 * pair + i / 4;
        a[row][i / 4][i % 4] = left[(row * 16 + i % 2 * 8) * Words::kPitch + step * kStepWords + i % 4 / 2 * 4];
      }
    }
#pragma unroll
    for (int tile = 0; tile < Plan::kColumnTiles; ++tile) {
      if (tile >= tiles) break;
      const uint4 b = *as_vector(right + ((tile * (Words::kSteps / 2) + pair) * kWarp + lane) * 4);
      const unsigned b_first[2] = {b.x, b.y}, b_second[2] = {b.z, b.w};
#pragma unroll
      for (int row = 0; row < kRowTiles; ++row) {
        multiply(T{}, tf32, a[row][0], b_first, sums[row][tile]);
        multiply(T{}, tf32, a[row][1], b_second, sums[row][tile]);
      }
    }
  }
}

// A thread's columns in the epilogue: V side by side, in kGroups places, of every kEvery-th pixel.
template <class Plan, int V> struct OutputLayout {
  static constexpr int kColumns = Plan::kColumns;
  static constexpr int kAcross = kColumns / V < kWarp ? kColumns / V : kWarp, kEvery = kWarp / kAcross;
  static constexpr int kGroups = kColumns / (kAcross * V);
};

struct OutputTile {
  int64_t n, first_d;
  int first_row, first_column, columns;  // columns: from first_d on, within D
};

template <class T, int V, class Plan>
__device__ void finish(const SeparateArgs& args, const OutputTile& place, const typename Plan::Sums& sums,
                       typename Plan::Rows16& transposed) {
  using Layout = OutputLayout<Plan, V>;
  constexpr int kWide = Plan::Shape::kWide;
  const FusedArgs& call = args.call;
  const auto* const residual = static_cast<const typename T::Stored*>(call.residual);
  const int lane = threadIdx.x % kWarp, first_pixel = threadIdx.x / kWarp * Plan::kPixels;
#pragma unroll
  for (int row = 0; row < Plan::kRowTiles; ++row) {
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < Plan::kColumnTiles; ++tile) {
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        transposed[lane / 4 + at / 2 * 8][tile * kTileWidth + lane % 4 * 2 + at % 2] = sums[row][tile][at];
      }
    }
    __syncwarp();
#pragma unroll
    for (int group = 0; group < Layout::kGroups; ++group) {
      const int d = (group * Layout::kAcross + lane % Layout::kAcross) * V;
      if (d >= place.columns) continue;
      float bias[V] = {};
      if (call.bias) load_row(call.bias + place.first_d + d, bias);
#pragma unroll 4
      for (int i = lane / Layout::kAcross; i < 16; i += Layout::kEvery) {
        const int pixel = first_pixel + row * 16 + i;
        const int y_row = place.first_row + pixel / kWide, y_column = place.first_column + pixel % kWide;
        if (y_row >= args.rows || y_column >= args.columns) continue;
        const int64_t to = ((place.n * args.rows + y_row) * args.columns + y_column) * call.d + place.first_d + d;
        float v[V], added[V] = {};
        load_floats(&transposed[i][d], v);
        if (residual) load<T, V>(residual + to, added);
        for (int j = 0; j < V; ++j) v[j] += bias[j] + added[j];
        store<T, V>(static_cast<typename T::Stored*>(call.y) + to, v);
      }
    }
  }
}

template <class T, int K, Resize kResize, int kTiles>
__global__ void __launch_bounds__(Plan<K, kResize, kTiles>::kThreads) separate(SeparateArgs args) {
  using Sizes = Plan<K, kResize, kTiles>;
  using Shape = typename Sizes::Shape;
  auto& shared = *static_cast<Shared<T, Sizes>*>(launched_shared());
  auto& operands = shared.operands;
  const DepthwiseLayer& s = args.call.layer;
  const ColumnBlocks split(args.call.d);
  const unsigned across = static_cast<unsigned>(ceiling(args.columns, Shape::kWide));
  const unsigned tiles = static_cast<unsigned>(ceiling(args.rows, Shape::kHigh)) * across;
  const unsigned blocks = static_cast<unsigned>(split.blocks);
  const unsigned block = blockIdx.x % blocks, at = blockIdx.x / blocks % tiles;
  const int64_t first_d = block * split.each * kTileWidth, left_over = args.call.d - first_d;
  const int64_t columns = left_over < split.each * kTileWidth ? left_over : split.each * kTileWidth;
  const OutputTile place{blockIdx.x / blocks / tiles, first_d, static_cast<int>(at / across) * Shape::kHigh,
                         static_cast<int>(at % across) * Shape::kWide, static_cast<int>(columns)};
  const int column_tiles = static_cast<int>(split.each), vectors = column_tiles * kTileWidth * Row<T>::kWords / 4;

  typename Sizes::Sums sums = {};
  unsigned* const left = operands.left + threadIdx.x / kWarp * Sizes::kPixels * Row<T>::kPitch;
  for (int64_t chunk = 0; chunk * kWarp < s.c; ++chunk) {
    const unsigned* const from = args.matrix + (chunk * split.blocks + block) * vectors * 4;
    for (int i = threadIdx.x; i < vectors; i += Sizes::kThreads) copy_async(operands.right + 4 * i, from + 4 * i);
    operands.depthwise.template load<Activated, T>(s, args.norm, {args.call.x, nullptr, s.h, s.w}, args.wide,
                                                   args.packed, place.n, chunk, place.first_row, place.first_column);
    float results[kThreadRows][Shape::kWide] = {};
    convolve_rows<K, kResize, Shape>(operands.depthwise.tile, operands.depthwise.weights, results);
    auto* const to = reinterpret_cast<typename T::Stored*>(left) + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < Sizes::kPixels; ++i) {
      to[i * Row<T>::kPitch * Row<T>::kElements] = T::narrow(results[i / Shape::kWide][i % Shape::kWide]);
    }
    wait_for_copies();
    __syncthreads();
    multiply<T, Sizes>(args.call.tf32, column_tiles, left, operands.right, sums);
    __syncthreads();  // before the next chunk, or the result, takes the place of this one
  }

  auto& transposed = shared.transposed[threadIdx.x / kWarp];
  if (args.wide_result) {
    finish<T, kVector<T>, Sizes>(args, place, sums, transposed);
  } else {
    finish<T, 1, Sizes>(args, place, sums, transposed);
  }
}

template <class T, int K, Resize kResize, int kTiles> void separate_as(Queue& queue, const SeparateArgs& args) {
  using Sizes = Plan<K, kResize, kTiles>;
  static_assert(sizeof(Shared<T, Sizes>) <= kSharedLimit);
  const int64_t of_sample = tiles<Block>(kResize, args.rows, args.columns) * ColumnBlocks(args.call.d).blocks;
  queue.with_shared(sizeof(Shared<T, Sizes>), separate<T, K, kResize, kTiles>, args.call.layer.n * of_sample,
                    Sizes::kThreads, args);
}

struct Workspace {
  float *mean, *var, *moments, *packed, *matrix;
  int64_t words = 0, floats;

  Workspace(const FusedArgs& args, float* memory) {
    const DepthwiseLayer& s = args.layer;
    for_dtype(s.dtype, [&](auto element) { words = matrix_words<decltype(element)>(args); });
    Scratch scratch(memory);
    mean = scratch.take(s.normalise, s.n * s.c);
    var = scratch.take(s.normalise, s.n * s.c);
    moments = scratch.take(s.normalise, moments_floats(moments_args(s, nullptr)));
    packed = scratch.take(true, taps(s) * taps(s) * s.c);
    matrix = scratch.take(true, words);
    floats = scratch.floats();
  }
};
}  // namespace

int64_t fused_floats(const FusedArgs& args) { return Workspace(args, nullptr).floats; }

const char* fused(const FusedArgs& args, float* scratch, int device, void* stream) {
  const DepthwiseLayer& s = args.layer;
  Queue queue(device, stream);
  queue.take(too_large(s));
  const Workspace work(args, scratch);
  auto* const matrix = reinterpret_cast<unsigned*>(work.matrix);
  if (s.normalise) queue.take(moments(moments_args(s, args.x), work.moments, work.mean, work.var, device, stream));
  queue(pack, ceiling(taps(s) * taps(s) * s.c, kThreads), kThreads, s, false, work.packed);
  bool wide_result = false;
  const auto note = [&](auto, auto vector) { wide_result = decltype(vector)::width > 1; };
  for_vectors(s.dtype, args.d, note, args.y, args.residual);
  for_vectors(s.dtype, s.c, [&](auto element, auto vector) {
    using T = decltype(element);
    queue(pack_matrix<T>, ceiling(work.words, kThreads), kThreads, args, work.words, matrix);
    const Norm norm{work.mean, work.var, nullptr, nullptr};
    const bool wide = decltype(vector)::width > 1;
    const SeparateArgs all{args, norm, wide, wide_result, work.packed, matrix, s.out(s.h), s.out(s.w)};
    for_kernel(s.k, resize_of(s.resize, false), [&](auto k, auto resize) {
      constexpr int K = decltype(k)::value, kFew = kMostTiles / 2;
      constexpr Resize kResize = decltype(resize)::value;
      const bool few = ColumnBlocks(args.d).each <= kFew;
      few ? separate_as<T, K, kResize, kFew>(queue, all) : separate_as<T, K, kResize, kMostTiles>(queue, all);
    });
  }, args.x);
  return queue.error();
}
}  // namespace raccgan::cuda
