// The forward pass of a depthwise-separable convolution in one kernel: the depthwise results of a tile stay in shared
// memory, where they are the left operand of a matrix product on the tensor cores.
//
//     y = (L a) W^T + bias + residual, in the notation of ops/depthwise.h
//
// A block has a tile of one sample's results and up to 128 of their channels, whose sums it keeps in registers. It goes
// through the channels of x by 32: while it copies their part of W into shared memory, it convolves them as tiles.h
// does and writes the results beside that, rounded to the product's operands. A warp multiplies its own results of the
// convolution. In the epilogue each warp transposes its sums in shared memory, so that residual and result move 16
// bytes at a time.
#include "images.h"

namespace raccgan::cuda {
namespace {
// A warp multiplies a [16, 8 words] and b [8 words, 8] on the tensor cores of a GPU from 8.0 on, a word being two 16-bit
// numbers or one of tf32, and adds the product to c [16, 8] of float32 (PTX ISA, "Matrix fragments for mma.m16n8k16" and
// "mma.m16n8k8"). With i = lane / 4 and j = lane % 4 a lane holds
//
//     a  the words (i, j), (i + 8, j), (i, j + 4), (i + 8, j + 4)
//     b  the words (j, i), (j + 4, i)
//     c  (i, 2j), (i, 2j + 1), (i + 8, 2j), (i + 8, 2j + 1)

// The nearest tf32 number, ties away from zero.
__device__ unsigned round_to_tf32(float v) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// Begins to copy 16 bytes from global to shared memory, both on a 16-byte boundary. They are there for the thread when
// wait_for_copies has returned, and for the others after a barrier.
__device__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

__device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// c += a b of elements T. Float32: rounded to tf32 where that is allowed. Else three products, of what tf32 holds of a
// number and of what that leaves over, together 21 bits and more of 24; the product of the two rests is below them.
// What an infinity leaves over is NaN, and so is the result.
#define RACCGAN_MMA(T, shape_and_types)                                                              \
  __device__ void multiply(T, bool, const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) { \
    asm volatile("mma.sync.aligned." shape_and_types                                                 \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                \
  }
struct Tf32 {};
RACCGAN_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
RACCGAN_MMA(Float16, "m16n8k16.row.col.f32.f16.f16.f32")
RACCGAN_MMA(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef RACCGAN_MMA

template <int kWords>
__device__ void split(const unsigned (&words)[kWords], unsigned (&large)[kWords], unsigned (&small)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const float v = __uint_as_float(words[i]);
    large[i] = round_to_tf32(v);
    small[i] = round_to_tf32(v - __uint_as_float(large[i]));
  }
}

__device__ void multiply(Float32, bool tf32, const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) {
  unsigned large_a[4], small_a[4], large_b[2], small_b[2];
  split(a, large_a, small_a);
  split(b, large_b, small_b);
  if (!tf32) {
    multiply(Tf32{}, true, small_a, large_b, c);
    multiply(Tf32{}, true, large_a, small_b, c);
  }
  multiply(Tf32{}, true, large_a, large_b, c);
}

constexpr int kTileWidth = 8;  // columns of a product's result
constexpr int kMostColumns = 128, kMostTiles = kMostColumns / kTileWidth;  // a block's
constexpr int kStepWords = 8;  // 4-byte words of a row that a product takes

// A row of 32 channels.
template <class T> struct Row {
  static constexpr int kWords = kWarp / kInWord<T>, kSteps = kWords / kStepWords;
  static constexpr int kPitch = kWords + 4;  // in shared memory: a product's 8 rows and 4 words have no bank conflict
};

// The columns of W, split evenly over the blocks of a tile, by tiles of kTileWidth.
struct ColumnBlocks {
  int64_t d, blocks = ceiling(d, kMostColumns), each = ceiling(ceiling(d, kTileWidth), blocks);
};

// The words of W, packed [chunks of 32 channels, tiles of columns, steps / 2, lanes, 4]: a lane's operand of two steps
// lies together, and all that a block needs of a chunk. Zero beyond C and D.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_matrix(FusedArgs args, int64_t words, unsigned* packed) {
  using Shape = Row<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  const ColumnBlocks columns{args.d};
  const int part = i % 4, lane = i / 4 % kWarp;
  const int64_t pair = i / (4 * kWarp) % (Shape::kSteps / 2), tile = i / (kTileWidth * Shape::kWords);
  const int64_t word = (2 * pair + part / 2) * kStepWords + lane % 4 + part % 2 * 4;
  const int64_t channel = tile / (columns.blocks * columns.each) * kWarp + word * kInWord<T>;
  const int64_t d = tile % (columns.blocks * columns.each) * kTileWidth + lane / 4;
  const auto* const from = static_cast<const typename T::Stored*>(args.pointwise);
  union {
    unsigned word;
    typename T::Stored elements[kInWord<T>];
  } to;
#pragma unroll
  for (int e = 0; e < kInWord<T>; ++e) {
    const bool there = d < args.d && channel + e < args.layer.c;
    to.elements[e] = there ? from[d * args.layer.c + channel + e] : T::narrow(0.0f);
  }
  packed[i] = to.word;
}

struct SeparateArgs {
  FusedArgs call;
  NormedLayer layer;
  Image in;
  bool wide_result;  // whether y, the residual and the bias allow 16-byte loads
  const float* packed;  // the depthwise weights
  const unsigned* matrix;
  int64_t rows, columns;  // of the result
};

constexpr int kProductWarps = 4;  // a block

// The sizes of a block, with sums for kTiles tiles of columns: with few, a multiprocessor has registers for a block
// more. A warp multiplies the pixels that it convolves, by 16, with all columns.
template <int K, Resize kResize, int kTiles> struct Plan {
  using Shape = Tile<K, kResize, kProductWarps>;
  static constexpr int kThreads = Shape::kWarps * kWarp, kColumnTiles = kTiles, kColumns = kTiles * kTileWidth;
  static constexpr int kPixels = kThreadRows * Shape::kWide, kRowTiles = kPixels / 16;  // a warp's
  static_assert(kRowTiles * 16 == kPixels);
  using Sums = float[kRowTiles][kTiles][4];
  // 16 pixels of all columns, transposed by a warp: rows that it writes together have no bank conflict.
  using Rows16 = float[16][kColumns + 8];
};

template <class T, class Plan> union Shared {
  struct {
    Operands<typename Plan::Shape> depthwise;
    alignas(16) unsigned left[Plan::Shape::kWarps * Plan::kPixels * Row<T>::kPitch];
    alignas(16) unsigned right[Plan::kColumns * Row<T>::kWords];
  } operands;
  typename Plan::Rows16 transposed[Plan::Shape::kWarps];
};

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

// Adds bias and residual and writes, channels from first_d on, within `columns`.
template <class T, int V, class Plan>
__device__ void finish(const SeparateArgs& args, const Position<typename Plan::Shape>& place, int64_t first_d,
                       int columns, const typename Plan::Sums& sums, typename Plan::Rows16& transposed) {
  // A thread's columns: V side by side, in kGroups places, of every kEvery-th pixel.
  constexpr int kAcross = Plan::kColumns / V < kWarp ? Plan::kColumns / V : kWarp, kEvery = kWarp / kAcross;
  constexpr int kGroups = Plan::kColumns / (kAcross * V);
  constexpr int kWide = Plan::Shape::kWide;
  const FusedArgs& call = args.call;
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
    for (int group = 0; group < kGroups; ++group) {
      const int d = (group * kAcross + lane % kAcross) * V;
      if (d >= columns) continue;
      float bias[V] = {};
      if (call.bias) load_floats(call.bias + first_d + d, bias);
#pragma unroll 4
      for (int i = lane / kAcross; i < 16; i += kEvery) {
        const int pixel = first_pixel + row * 16 + i;
        const int y_row = place.row + pixel / kWide, y_column = place.column + pixel % kWide;
        if (y_row >= args.rows || y_column >= args.columns) continue;
        const int64_t to = ((place.n * args.rows + y_row) * args.columns + y_column) * call.d + first_d + d;
        float v[V], added[V] = {};
        load_floats(&transposed[i][d], v);
        if (call.residual) load<T, V>(call.residual, to, added);
        for (int j = 0; j < V; ++j) v[j] += bias[j] + added[j];
        store<T, V>(call.y, to, v);
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
  const NormedLayer& s = args.layer;
  const ColumnBlocks split{args.call.d};
  const Position<Shape> place{args.rows, args.columns, static_cast<unsigned>(split.blocks)};
  const int64_t first_d = place.part * split.each * kTileWidth;
  const int columns = static_cast<int>(least(args.call.d - first_d, split.each * kTileWidth));
  const int column_tiles = static_cast<int>(split.each), vectors = column_tiles * kTileWidth * Row<T>::kWords / 4;

  typename Sizes::Sums sums = {};
  unsigned* const left = operands.left + threadIdx.x / kWarp * Sizes::kPixels * Row<T>::kPitch;
  for (int64_t chunk = 0; chunk * kWarp < s.c; ++chunk) {
    const unsigned* const from = args.matrix + (chunk * split.blocks + place.part) * vectors * 4;
    for (int i = threadIdx.x; i < vectors; i += Sizes::kThreads) copy_async(operands.right + 4 * i, from + 4 * i);
    operands.depthwise.template load<Activated, T>(s, args.in, args.packed, {place.n, chunk, place.row, place.column});
    float results[kThreadRows][Shape::kWide] = {};
    convolve_rows<K, kResize, Shape>(operands.depthwise.tile, operands.depthwise.weights, results);
    auto* const to = reinterpret_cast<typename T::Stored*>(left) + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < Sizes::kPixels; ++i) {
      to[i * Row<T>::kPitch * kInWord<T>] = T::narrow(results[i / Shape::kWide][i % Shape::kWide]);
    }
    wait_for_copies();
    __syncthreads();
    multiply<T, Sizes>(args.call.tf32, column_tiles, left, operands.right, sums);
    __syncthreads();  // before the next chunk, or the result, takes the place of this one
  }

  auto& transposed = shared.transposed[threadIdx.x / kWarp];
  if (args.wide_result) {
    finish<T, kVector<T>, Sizes>(args, place, first_d, columns, sums, transposed);
  } else {
    finish<T, 1, Sizes>(args, place, first_d, columns, sums, transposed);
  }
}

template <class T, int K, Resize kResize, int kTiles> void separate_as(Queue& queue, const SeparateArgs& args) {
  using Sizes = Plan<K, kResize, kTiles>;
  static_assert(sizeof(Shared<T, Sizes>) <= 99 * 1024, "the least that a GPU from 8.0 on gives to a block");
  const int64_t blocks = tiles(kResize, kProductWarps, args.rows, args.columns) * ColumnBlocks{args.call.d}.blocks;
  queue.with_shared(sizeof(Shared<T, Sizes>), separate<T, K, kResize, kTiles>, args.layer.n * blocks, Sizes::kThreads,
                    args);
}

struct Workspace {
  const FusedArgs& args;
  Scratch scratch;
  LayerMoments moments{args.layer, args.x, scratch};
  float* packed = scratch.take(taps(args.layer) * taps(args.layer) * args.layer.c);
  ColumnBlocks columns{args.d};
  int64_t words =
      ceiling(args.layer.c, kWarp) * columns.blocks * columns.each * kTileWidth * kWarp * size_of(args.layer.dtype) / 4;
  unsigned* matrix = reinterpret_cast<unsigned*>(scratch.take(words));
};
}  // namespace

int64_t scratch_floats(const FusedArgs& args) { return Workspace{args, {nullptr}}.scratch.floats; }

const char* queue_pass(const FusedArgs& args, float* memory, int device, void* stream) {
  const DepthwiseLayer& s = args.layer;
  const Workspace work{args, {memory}};
  Queue queue(device, stream);
  queue.take(too_large(s));
  work.moments.find(queue);
  pack_weights(queue, s, false, work.packed);
  const NormedLayer layer{s, work.moments.mean, work.moments.var, nullptr, nullptr};
  const Image in{args.x, nullptr, s.h, s.w, allow_vectors(s.dtype, s.c, args.x)};
  const bool wide_result = allow_vectors(s.dtype, args.d, args.y, args.residual, args.bias);
  const SeparateArgs all{args, layer, in, wide_result, work.packed, work.matrix, s.out(s.h), s.out(s.w)};
  for_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    queue(pack_matrix<T>, ceiling(work.words, kThreads), kThreads, args, work.words, work.matrix);
    for_kernel(s.k, s.resize, [&](auto k, auto resize) {
      constexpr int kFew = kMostTiles / 2;
      const bool few = work.columns.each <= kFew;
      few ? separate_as<T, k, resize, kFew>(queue, all) : separate_as<T, k, resize, kMostTiles>(queue, all);
    });
  });
  return queue.error;
}
}  // namespace raccgan::cuda
