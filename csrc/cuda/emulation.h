// Runs the CUDA kernels on a CPU, so that tests execute their index arithmetic and barriers without a GPU.
//
// A block's threads are fibers that take turns: each runs until it waits for the others, at __syncthreads or in a
// shuffle. Blocks run one after the other. What it finds: wrong indices, misaligned 16-byte loads, barriers that not
// every thread reaches (it aborts); and where RACCGAN_EMULATION_BACKWARDS is set, so that the last thread goes first,
// many a missing barrier. What it does not: other data races, since fibers never run at once.
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

// The block that is running.
struct Block {
  static constexpr unsigned kWarp = 32;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;  // what each thread offers in a shuffle
  uint64_t progress = 0;        // fibers that finished and barriers that opened

  void yield() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }
  void run(unsigned threads);
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
  block.fibers[threadIdx.x].finished = true;
  ++block.progress;
}

inline void Block::run(unsigned threads) {
  static const bool backwards = getenv("RACCGAN_EMULATION_BACKWARDS") != nullptr;
  if (threads % kWarp != 0) fail("a block is a whole number of warps here");
  fibers.resize(threads);
  slots.assign(threads, 0);
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

template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) emulation::fail("a misaligned load");
  return *from;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
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

inline unsigned short round_to_bfloat16(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t, Arguments... arguments) {
  emulation::block.kernel = [=] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) emulation::block.run(threads);
}

}  // namespace cuda
}  // namespace raccgan
