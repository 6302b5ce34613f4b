// lowrank_conv2d: a kh x kw convolution to r channels per group, then 1 x 1, in one call.
//
// down: dense pack with taps = kh * kw and n = r per group; up: dense pack with taps = 1, k = r. As in
// lowrank_linear the intermediate is a tile of pixels, requantised per pixel and group for int8 factors.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

struct LowRankConv2dArgs : ConvArgs { // packed: down; epilogue.w_scale: up's
    const uint8_t *up = nullptr;
    const float *down_scale = nullptr; // [groups * r], null for float factors
};

void lowrank_conv2d(const LowRankConv2dArgs &args);

} // namespace tautorch
