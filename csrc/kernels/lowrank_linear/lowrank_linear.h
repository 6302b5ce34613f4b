// lowrank_linear: y[M, N] = activation(up(down(x)) + residual(x) + bias) with down [r, K], up [N, r] and a
// residual [N, K] or none, in one call.
//
// Both factors are dense packs of the same kind: dense_f32, or dense_i8 with a scale per row of the factor;
// then the intermediate is requantised per row. It stays in a tile of rows, in cache. The residual is
// dense_i8 or sparse; x is quantised once for it and down where both are int8.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

struct LowRankLinearArgs : LinearArgs { // packed: down; out.epilogue.w_scale: up's
    const uint8_t *up = nullptr;
    const float *down_scale = nullptr;     // [r], null for float factors
    const uint8_t *residual = nullptr;     // or null
    const float *residual_scale = nullptr; // [N], null for float values
};

void lowrank_linear(const LowRankLinearArgs &args);

} // namespace tautorch
