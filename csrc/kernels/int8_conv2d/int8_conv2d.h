// int8_conv2d: 2-D convolution with int8 weights, as an implicit GEMM on int8_linear's micro-kernels.
//
// Weights [O, I/groups, kh, kw] packed by dense_pack as conv.h says: dense_i8, dense_w8 for weight-only,
// depthwise_i8 for one input and one output channel per group, grouped_i8 for 4, 8 or 16 of both. Other small
// groups may be packed as fewer, larger ones whose weights are 0 between the groups they are made of.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

void int8_conv2d(const ConvArgs &args);

} // namespace tautorch
