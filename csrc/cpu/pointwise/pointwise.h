// The CPU kernels of ops/pointwise.h; one set a target, see simd/targets.h.
//
// Images are float32 or bfloat16; the rest is float32, and so are all sums. To multiply bfloat16 images by more than a
// few columns the weights are rounded to bfloat16.
#pragma once

#include "../../ops/pointwise.h"
#include "../simd/targets.h"

namespace raccgan {
// Few rows are split by columns instead: a thread with some of the rows would pack all of b.
constexpr int64_t kRowsATask = 64;
static constexpr bool by_columns(const ProductArgs& args) { return args.m < 8 * kRowsATask; }

// Pixels whose sum is float32, by the shape alone, never by threads or hardware: the sum over chunks is always the
// same.
constexpr int64_t kCorrelationChunk = 4096;
static constexpr int64_t correlation_chunks(int64_t m) { return rounded_up(m, kCorrelationChunk) / kCorrelationChunk; }

// A pass does the tasks begin <= i < end. A caller may split them over threads in any way, with _scratch floats for
// each thread, aligned to 64 bytes. pack_factor writes packed_factor floats, which serve any M; zero floats where b
// needs no packing.
#define RACCGAN_DECLARE(target, unused)                                                      \
  namespace target {                                                                         \
  int64_t packed_factor(const ProductArgs& args);                                            \
  void pack_factor(const ProductArgs& args, float* packed);                                  \
  int64_t product_tasks(const ProductArgs& args);                                            \
  int64_t product_scratch(const ProductArgs& args);                                          \
  void product(const ProductArgs& args, float* scratch, int64_t begin, int64_t end);         \
  int64_t correlation_tasks(const CorrelationArgs& args);                                    \
  int64_t correlation_scratch(const CorrelationArgs& args);                                  \
  void correlation(const CorrelationArgs& args, float* scratch, int64_t begin, int64_t end); \
  }
RACCGAN_FOR_EACH_TARGET(RACCGAN_DECLARE, )
#undef RACCGAN_DECLARE
}  // namespace raccgan
