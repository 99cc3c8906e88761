// A product on one thread, for the depthwise-separable convolution; see ../kernels.h for the whole.
#pragma once

#include "../kernels.h"
#include "../threads.h"

namespace raccgan {
constexpr int64_t kRowsATask = 64;

namespace RACCGAN_TARGET {
// Floats of scratch memory, aligned to 64 bytes, for a thread.
int64_t product_scratch(const ProductArgs& args);

// Rows first <= m < first + count, of which `a` begins with the first.
void product_of_rows(const ProductArgs& args, int64_t first, int64_t count, const void* a, float* scratch);
}  // namespace RACCGAN_TARGET
}  // namespace raccgan
