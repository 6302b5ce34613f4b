// lowrank_linear: y[M, N] = activation(up(down(x)) + bias) with down [r, K] and up [N, r], in one call.
//
// Both factors are dense packs of the same kind: dense_f32, or dense_i8 with a scale per row of the factor;
// then the intermediate is requantised per row. It stays in a tile of rows, in cache.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

struct LowRankLinearArgs : LinearArgs { // packed: down; out.epilogue.w_scale: up's
    const uint8_t *up = nullptr;
    const float *down_scale = nullptr; // [r], null for float factors
};

void lowrank_linear(const LowRankLinearArgs &args);

} // namespace tautorch
