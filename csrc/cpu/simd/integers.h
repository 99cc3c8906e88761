// Arithmetic of sizes. static: nothing is merged across targets, see targets.h.
#pragma once

#include <stdint.h>

namespace raccgan {

static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
static constexpr int64_t rounded_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

}  // namespace raccgan
