// The forward pass of a depthwise-separable convolution in one kernel: the depthwise results of a tile stay in shared
// memory, where they are the left operand of a matrix product on the tensor cores.
//
//     y = (L relu(z scale + shift)) W^T + bias + residual, in the notation of depthwise_separable.cu
//
// Compiled for the architectures in setup.py and run on the PTX machine of tests/ptx, but not yet on a GPU: no speed is
// claimed for it.
//
// A block has a tile of one sample's results and up to 128 of their channels, whose sums it keeps in registers. It goes
// through the channels of x by 32: while the part of W that belongs to them is on its way into shared memory, it
// convolves them as depthwise_tiles.h does and writes the results beside it, rounded to what the product takes. A warp
// multiplies what it has convolved itself. At the end each warp turns its sums round in shared memory, so that they
// meet the residual and leave 16 bytes at a time.
#include "depthwise_images.h"
#include "tensor_cores.h"

namespace raccgan {
namespace cuda {
namespace {

// ---- the matrix --------------------------------------------------------------------------------------------------

constexpr int kTileWidth = 8;                   // columns of a product's result
constexpr int kMostTiles = 128 / kTileWidth;    // a block's, of columns
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
      : blocks(ceiling(d, kMostTiles * kTileWidth)), each(ceiling(ceiling(d, kTileWidth), blocks)) {}
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
  bool wide, wide_result;  // whether x, and whether y and the residual, allow 16-byte loads
  const float* packed;     // the depthwise weights
  const unsigned* matrix;
  int64_t rows, columns;   // of the result
  float* partial;          // [N, tiles, kStatistics, D], or null
};

template <int K, Form kForm>
using Block = Tile<K, kForm, 4>;

// What a block computes, with room for kTiles tiles of columns: of few, a multiprocessor has registers for a block more.
// Its warps multiply the pixels that they convolve, by 16, with all of the columns.
template <int K, Form kForm, int kTiles>
struct Plan {
  using Shape = Block<K, kForm>;
  static constexpr int kThreads = Shape::kWarps * kWarp, kColumnTiles = kTiles, kColumns = kTiles * kTileWidth;
  static constexpr int kPixels = kDeep * Shape::kStrip, kRowTiles = kPixels / 16;  // a warp's
  static_assert(kRowTiles * 16 == kPixels);
  using Sums = float[kRowTiles][kTiles][4];
  // 16 pixels of all columns, as a warp turns them round: no two rows that it writes at once share a bank.
  using Turned = float[16][kColumns + 8];
  using Statistics = float[kStatistics][Shape::kWarps][kColumns];
};

template <class T, class Plan>
struct Multiplied {
  Operands<typename Plan::Shape> depthwise;
  alignas(16) unsigned left[Plan::Shape::kWarps * Plan::kPixels * Row<T>::kPitch];
  alignas(16) unsigned right[Plan::kColumns * Row<T>::kWords];
};

template <class T, class Plan>
union Shared {
  Multiplied<T, Plan> operands;
  typename Plan::Turned turned[Plan::Shape::kWarps];
  typename Plan::Statistics statistics;
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

// ---- the result --------------------------------------------------------------------------------------------------

// What a thread has of the block's columns at the end: V side by side, in kGroups places, of every kEvery-th pixel.
template <class Plan, int V>
struct Share {
  static constexpr int kColumns = Plan::kColumns;
  static constexpr int kAcross = kColumns / V < kWarp ? kColumns / V : kWarp, kEvery = kWarp / kAcross;
  static constexpr int kGroups = kColumns / (kAcross * V);
  using Found = float[kStatistics][kGroups][V];
};

// Where a block's results belong.
struct Place {
  int64_t n, first_d;
  int first_row, first_column, columns;  // the columns that there are, from first_d on
};

// Adds bias and residual, writes what lies inside of the image, and takes the statistics of what was written.
template <class T, int V, class Plan>
__device__ void finish(const SeparateArgs& args, const Place& place, const typename Plan::Sums& sums,
                       typename Plan::Turned& turned, typename Share<Plan, V>::Found& found) {
  using Mine = Share<Plan, V>;
  constexpr int kStrip = Plan::Shape::kStrip;
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
        turned[lane / 4 + at / 2 * 8][tile * kTileWidth + lane % 4 * 2 + at % 2] = sums[row][tile][at];
      }
    }
    __syncwarp();
#pragma unroll
    for (int group = 0; group < Mine::kGroups; ++group) {
      const int d = (group * Mine::kAcross + lane % Mine::kAcross) * V;
      if (d >= place.columns) continue;
      float bias[V] = {};
      if (call.bias) load_row(call.bias + place.first_d + d, bias);
#pragma unroll 4
      for (int i = lane / Mine::kAcross; i < 16; i += Mine::kEvery) {
        const int pixel = first_pixel + row * 16 + i;
        const int y_row = place.first_row + pixel / kStrip, y_column = place.first_column + pixel % kStrip;
        if (y_row >= args.rows || y_column >= args.columns) continue;
        const int64_t to = ((place.n * args.rows + y_row) * args.columns + y_column) * call.d + place.first_d + d;
        float v[V], added[V] = {};
        load_floats(&turned[i][d], v);
        if (residual) load<T, V>(residual + to, added);
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] += bias[j] + added[j];
        const Packed<T, V> stored = narrow<T, V>(v);
        put<T, V>(static_cast<typename T::Stored*>(call.y) + to, stored);
        widen<T>(stored, v);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          found[0][group][j] += v[j];
          found[1][group][j] = fmaf(v[j], v[j], found[1][group][j]);
          found[2][group][j] = larger(found[2][group][j], v[j]);
        }
      }
    }
  }
}

inline __device__ float combined(int statistic, float a, float b) { return statistic == 2 ? larger(a, b) : a + b; }

// The block's statistics of what its threads have found, by way of `shared`: to [kStatistics, D].
template <int V, class Plan>
__device__ void summarise(const typename Share<Plan, V>::Found& found, int columns, int64_t d,
                          typename Plan::Statistics& shared, float* to) {
  using Mine = Share<Plan, V>;
  const int lane = threadIdx.x % kWarp;
  __syncthreads();
#pragma unroll
  for (int statistic = 0; statistic < kStatistics; ++statistic) {
#pragma unroll
    for (int group = 0; group < Mine::kGroups; ++group) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float v = found[statistic][group][j];
#pragma unroll
        for (int offset = Mine::kAcross; offset < kWarp; offset *= 2) {
          v = combined(statistic, v, __shfl_xor_sync(0xffffffff, v, offset));
        }
        const int column = (group * Mine::kAcross + lane % Mine::kAcross) * V + j;
        if (lane < Mine::kAcross) shared[statistic][threadIdx.x / kWarp][column] = v;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kStatistics * columns; i += Plan::kThreads) {
    const int statistic = i / columns, column = i % columns;
    float v = shared[statistic][0][column];
#pragma unroll
    for (int warp = 1; warp < Plan::Shape::kWarps; ++warp) v = combined(statistic, v, shared[statistic][warp][column]);
    to[statistic * d + column] = v;
  }
}

template <class T, int V, class Plan>
__device__ void finish_block(const SeparateArgs& args, const Place& place, const typename Plan::Sums& sums,
                             Shared<T, Plan>& shared, float* partial) {
  typename Share<Plan, V>::Found found = {};
#pragma unroll
  for (int group = 0; group < Share<Plan, V>::kGroups; ++group) {
#pragma unroll
    for (int j = 0; j < V; ++j) found[2][group][j] = -INFINITY;
  }
  finish<T, V, Plan>(args, place, sums, shared.turned[threadIdx.x / kWarp], found);
  if (partial) summarise<V, Plan>(found, place.columns, args.call.d, shared.statistics, partial);
}

// A block of columns, a tile and a sample.
template <class T, int K, Form kForm, int kTiles>
__global__ void __launch_bounds__(Plan<K, kForm, kTiles>::kThreads) separate(SeparateArgs args) {
  using Own = Plan<K, kForm, kTiles>;
  using Shape = typename Own::Shape;
  auto& shared = *static_cast<Shared<T, Own>*>(launched_shared());
  auto& operands = shared.operands;
  const DepthwiseLayer& s = args.call.layer;
  const ColumnShare share(args.call.d);
  const unsigned across = static_cast<unsigned>(ceiling(args.columns, Shape::kStrip));
  const unsigned tiles = static_cast<unsigned>(ceiling(args.rows, Shape::kHigh)) * across;
  const unsigned blocks = static_cast<unsigned>(share.blocks);
  const unsigned block = blockIdx.x % blocks, at = blockIdx.x / blocks % tiles;
  const int64_t first_d = block * share.each * kTileWidth, left_over = args.call.d - first_d;
  const int64_t columns = left_over < share.each * kTileWidth ? left_over : share.each * kTileWidth;
  const Place place{blockIdx.x / blocks / tiles, first_d, static_cast<int>(at / across) * Shape::kHigh,
                    static_cast<int>(at % across) * Shape::kStrip, static_cast<int>(columns)};
  const int column_tiles = static_cast<int>(share.each), vectors = column_tiles * kTileWidth * Row<T>::kWords / 4;

  typename Own::Sums sums = {};
  unsigned* const left = operands.left + threadIdx.x / kWarp * Own::kPixels * Row<T>::kPitch;
  for (int64_t chunk = 0; chunk * kWarp < s.c; ++chunk) {
    const unsigned* const from = args.matrix + (chunk * share.blocks + block) * vectors * 4;
    for (int i = threadIdx.x; i < vectors; i += Own::kThreads) copy_async(operands.right + 4 * i, from + 4 * i);
    operands.depthwise.template load<Activated, T>(s, args.norm, {args.call.x, nullptr, s.h, s.w}, args.wide,
                                                   args.packed, place.n, chunk, place.first_row, place.first_column);
    float strips[kDeep][Shape::kStrip] = {};
    convolve_rows<K, kForm, Shape>(operands.depthwise.tile, operands.depthwise.weights, strips);
    auto* const to = reinterpret_cast<typename T::Stored*>(left) + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < Own::kPixels; ++i) {
      to[i * Row<T>::kPitch * Row<T>::kElements] = T::narrow(strips[i / Shape::kStrip][i % Shape::kStrip]);
    }
    wait_for_copies();
    __syncthreads();
    multiply<T, Own>(args.call.tf32, column_tiles, left, operands.right, sums);
    __syncthreads();  // before the next chunk, or the result, takes the place of this one
  }

  float* partial = args.partial;
  if (partial) partial += (place.n * tiles + at) * kStatistics * args.call.d + first_d;
  if (args.wide_result) {
    finish_block<T, kVector<T>, Own>(args, place, sums, shared, partial);
  } else {
    finish_block<T, 1, Own>(args, place, sums, shared, partial);
  }
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

template <class T, int K, Form kForm, int kTiles>
void separate_as(Queue& queue, const SeparateArgs& args) {
  using Own = Plan<K, kForm, kTiles>;
  static_assert(sizeof(Shared<T, Own>) <= kSharedLimit);
  const int64_t of_sample = tiles<Block>(kForm, args.rows, args.columns) * ColumnShare(args.call.d).blocks;
  queue.with_shared(sizeof(Shared<T, Own>), separate<T, K, kForm, kTiles>, args.call.layer.n * of_sample, Own::kThreads,
                    args);
}

template <class T, int K, Form kForm>
void separate_as(Queue& queue, const SeparateArgs& args) {
  constexpr int kFew = kMostTiles / 2;
  const bool few = ColumnShare(args.call.d).each <= kFew;
  few ? separate_as<T, K, kForm, kFew>(queue, args) : separate_as<T, K, kForm, kMostTiles>(queue, args);
}

template <class T, int K>
void separate_as(Queue& queue, Form form, const SeparateArgs& args) {
  switch (form) {
    case Form::kPlain: separate_as<T, K, Form::kPlain>(queue, args); break;
    case Form::kDown: separate_as<T, K, Form::kDown>(queue, args); break;
    case Form::kUp: separate_as<T, K, Form::kUp>(queue, args); break;
  }
}

int64_t tiles_of(const DepthwiseLayer& s) { return tiles<Block>(form_of(s.resize, false), s.out(s.h), s.out(s.w)); }

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
  queue.take(too_large(s));
  const Workspace work(args, scratch);
  auto* const matrix = reinterpret_cast<unsigned*>(work.matrix);
  if (s.normalise) queue.take(moments(runs_of(s, args.x), work.moments, work.mean, work.var, device, stream));
  queue(pack, ceiling(taps(s) * taps(s) * s.c, kThreads), kThreads, s, false, work.packed);
  bool wide_result = false;
  const auto note = [&](auto, auto vector) { wide_result = decltype(vector)::width > 1; };
  for_vectors(s.dtype, args.d, note, args.y, args.residual);
  for_vectors(s.dtype, s.c, [&](auto element, auto vector) {
    using T = decltype(element);
    queue(pack_matrix<T>, ceiling(work.words, kThreads), kThreads, args, work.words, matrix);
    const SeparateArgs all{args, {work.mean, work.var, nullptr, nullptr}, decltype(vector)::width > 1, wide_result,
                           work.packed, matrix, s.out(s.h), s.out(s.w), work.partial};
    for_size(s.k, [&](auto k) { separate_as<T, decltype(k)::value>(queue, form_of(s.resize, false), all); });
  }, args.x);
  if (args.sum) queue(finish_statistics, ceiling(s.n * args.d, kThreads), kThreads, args, tiles_of(s), work.partial);
  return queue.error();
}

}  // namespace cuda
}  // namespace raccgan
