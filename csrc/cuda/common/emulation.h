// Runs the CUDA kernels on a CPU, so that tests execute their index arithmetic and barriers without a GPU.
//
// A block's threads are fibers that take turns: each runs until it waits for the others, at __syncthreads, in a shuffle
// or in a product of the tensor cores. Blocks run one after the other. What it finds: wrong indices, misaligned 16-byte
// loads, barriers that not every thread reaches (it aborts), copies into shared memory that nobody waits for; and where
// RACCGAN_EMULATION_BACKWARDS is set, so that the last thread goes first, many a missing barrier. What it does not:
// other data races, since fibers never run at once.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  abort();
}

struct Fiber {
  static constexpr size_t kStack = 1 << 16;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool finished = false;
};

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  void wait();
};

// A thread's words of the operands of a product on the tensor cores.
struct Fragments {
  unsigned a[4], b[2];
};

// 16 bytes on their way into shared memory.
struct Copy {
  void* to;
  const void* from;
};

// The block that is running.
struct Block {
  static constexpr unsigned kWarp = 32;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;  // what each thread offers in a shuffle
  std::vector<Fragments> fragments;            // and to the tensor cores
  std::vector<std::vector<Copy>> copies;       // what each thread has begun to copy
  std::unique_ptr<uint4[]> shared;             // what the launch asked for
  uint64_t progress = 0;        // fibers that finished and barriers that opened

  void yield() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }
  void run(unsigned threads, size_t bytes);
};
inline Block block;

inline void Barrier::wait() {
  const unsigned current = generation;
  if (++arrived == expected) {
    arrived = 0;
    ++generation;
    ++block.progress;
  }
  while (generation == current) block.yield();
}

inline void start_fiber() {
  block.kernel();
  if (!block.copies[threadIdx.x].empty()) fail("a copy that nobody waited for");
  block.fibers[threadIdx.x].finished = true;
  ++block.progress;
}

inline void Block::run(unsigned threads, size_t bytes) {
  static const bool backwards = getenv("RACCGAN_EMULATION_BACKWARDS") != nullptr;
  if (threads % kWarp != 0) fail("a block is a whole number of warps here");
  fibers.resize(threads);
  slots.assign(threads, 0);
  fragments.assign(threads, {});
  copies.assign(threads, {});
  shared.reset(new uint4[bytes / sizeof(uint4)]);
  memset(shared.get(), 0xff, bytes);  // NaN, until something is written
  all = {threads};
  warps.assign(threads / kWarp, {kWarp});
  for (Fiber& fiber : fibers) {
    fiber.finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start_fiber, 0);
  }
  for (bool alive = true; alive;) {
    const uint64_t before = progress;
    alive = false;
    for (unsigned turn = 0; turn < threads; ++turn) {
      threadIdx.x = backwards ? threads - 1 - turn : turn;
      if (fibers[threadIdx.x].finished) continue;
      alive = true;
      swapcontext(&scheduler, &fibers[threadIdx.x].context);
    }
    if (alive && progress == before) fail("not every thread reaches the barrier");
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::block.all.wait(); }
inline void __syncwarp() { emulation::block.warps[threadIdx.x / emulation::Block::kWarp].wait(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  using emulation::block;
  if (mask != 0xffffffff) emulation::fail("only shuffles of a whole warp");
  static_assert(sizeof(T) <= sizeof(uint64_t));
  emulation::Barrier& warp = block.warps[threadIdx.x / block.kWarp];
  memcpy(&block.slots[threadIdx.x], &value, sizeof value);
  warp.wait();
  memcpy(&value, &block.slots[threadIdx.x ^ offset], sizeof value);
  warp.wait();
  return value;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline unsigned short __ushort_as_half(unsigned short bits) { return bits; }
inline unsigned short __half_as_ushort(unsigned short bits) { return bits; }

inline float __half2float(unsigned short bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
      : exponent == 0                    ? ldexpf(fraction, -24)
                                         : ldexpf(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

inline unsigned short __float2half_rn(float value) {
  const unsigned short sign = signbit(value) ? 0x8000 : 0;
  const float magnitude = fabsf(value);
  if (!(magnitude <= INFINITY)) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude == 0.0f) return sign;
  int exponent;
  frexpf(magnitude, &exponent);
  const int lowest = (exponent < -13 ? -13 : exponent) - 11;  // the last bit's, of a number or a denormal
  const int steps = static_cast<int>(nearbyintf(ldexpf(magnitude, -lowest)));
  return sign | static_cast<unsigned short>(((lowest + 24) << 10) + steps);
}

namespace raccgan {
namespace cuda {

template <class T>
const uint4* as_vector(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(uint4) != 0) emulation::fail("a misaligned load or store");
  return reinterpret_cast<const uint4*>(address);
}
template <class T>
uint4* as_vector(T* address) {
  return const_cast<uint4*>(as_vector(static_cast<const T*>(address)));
}

inline void store_global(uint4* to, const uint4& value) { *to = value; }

inline unsigned short round_to_bfloat16(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float larger(float a, float b) { return a > b || a != a ? a : b; }

inline unsigned round_to_tf32(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fffe000;
  return (bits + 0x1000) & 0xffffe000;
}

// c += a b by the layout of tensor_cores.h, of words that hold kElements elements which `widen` reads.
template <int kElements, class Widen>
void multiply_words(const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4], const Widen& widen) {
  using emulation::block;
  const unsigned lane = threadIdx.x % block.kWarp, first = threadIdx.x - lane;
  emulation::Barrier& warp = block.warps[threadIdx.x / block.kWarp];
  emulation::Fragments& own = block.fragments[threadIdx.x];
  memcpy(own.a, a, sizeof a);
  memcpy(own.b, b, sizeof b);
  warp.wait();
  for (unsigned at = 0; at < 4; ++at) {
    const unsigned row = lane / 4 + at / 2 * 8, column = lane % 4 * 2 + at % 2;
    for (unsigned word = 0; word < 8; ++word) {
      const unsigned of_a = block.fragments[first + row % 8 * 4 + word % 4].a[row / 8 + word / 4 * 2];
      const unsigned of_b = block.fragments[first + column * 4 + word % 4].b[word / 4];
      for (int i = 0; i < kElements; ++i) c[at] = fmaf(widen(of_a, i), widen(of_b, i), c[at]);
    }
  }
  warp.wait();
}

inline void multiply_bfloat16(const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) {
  multiply_words<2>(a, b, c, [](unsigned word, int i) { return __uint_as_float(word >> 16 * i << 16); });
}

inline void multiply_float16(const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) {
  multiply_words<2>(a, b, c, [](unsigned word, int i) { return __half2float(word >> 16 * i & 0xffff); });
}

// The tensor cores read 19 bits of each word.
inline void multiply_tf32(const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) {
  multiply_words<1>(a, b, c, [](unsigned word, int) { return __uint_as_float(word & 0xffffe000); });
}

// The copy is made when it is waited for; from now on nobody can rely on what it replaces.
inline void copy_async(void* shared, const void* global) {
  uint4* const to = as_vector(static_cast<char*>(shared));
  memset(to, 0xff, sizeof *to);
  emulation::block.copies[threadIdx.x].push_back({to, as_vector(static_cast<const char*>(global))});
}

inline void wait_for_copies() {
  for (const emulation::Copy& copy : emulation::block.copies[threadIdx.x]) memcpy(copy.to, copy.from, sizeof(uint4));
  emulation::block.copies[threadIdx.x].clear();
}

inline void* launched_shared() { return emulation::block.shared.get(); }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, cudaStream_t,
                   Arguments... arguments) {
  if (shared % sizeof(uint4) != 0) emulation::fail("shared memory is a whole number of 16 bytes here");
  emulation::block.kernel = [=] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) emulation::block.run(threads, shared);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  launch(kernel, blocks, threads, 0, stream, arguments...);
}

}  // namespace cuda
}  // namespace raccgan
