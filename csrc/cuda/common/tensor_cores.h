// The tensor cores of GPUs from compute capability 8.0 on, and copies into shared memory beside the arithmetic.
//
// A warp multiplies a [16, 8 words] and b [8 words, 8], a word being two 16-bit numbers or one of tf32, and adds the
// product to c [16, 8] of float32 (PTX ISA, "Matrix fragments for mma.m16n8k16" and "mma.m16n8k8"). With i = lane / 4
// and j = lane % 4 a lane holds
//
//     a  the words (i, j), (i + 8, j), (i, j + 4), (i + 8, j + 4)
//     b  the words (j, i), (j + 4, i)
//     c  (i, 2j), (i, 2j + 1), (i + 8, 2j), (i + 8, 2j + 1)
#pragma once

#include "elements.h"

namespace raccgan::cuda { namespace {
// The nearest tf32 number, ties away from zero.
inline __device__ unsigned round_to_tf32(float v) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// Begins to copy 16 bytes from global to shared memory, both on a 16-byte boundary. They are there for the thread when
// wait_for_copies has returned, and for the others after a barrier.
inline __device__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

inline __device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// c += a b of elements T. Float32: rounded to tf32 where that is allowed. Else three products, of what tf32 holds of a
// number and of what that leaves over, together 21 bits and more of 24; the product of the two rests is below them.
// What an infinity leaves over is NaN, and so is the result.
#define RACCGAN_MMA(T, shape_and_types)                                                                     \
  inline __device__ void multiply(T, bool, const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) { \
    asm volatile("mma.sync.aligned." shape_and_types                                                        \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                       \
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

inline __device__ void multiply(Float32, bool tf32, const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4]) {
  unsigned large_a[4], small_a[4], large_b[2], small_b[2];
  split(a, large_a, small_a);
  split(b, large_b, small_b);
  if (!tf32) {
    multiply(Tf32{}, true, small_a, large_b, c);
    multiply(Tf32{}, true, large_a, small_b, c);
  }
  multiply(Tf32{}, true, large_a, large_b, c);
}
}}  // namespace raccgan::cuda
