// int8_conv2d: 2-D convolution with int8 weights, as an implicit GEMM on int8_linear's micro-kernels.
//
// Weights [O, I/groups, kh, kw] packed by dense_pack with groups, n = O/groups, k = I/groups, taps = kh * kw
// (dense_i8, dense_w8 for weight-only), or depthwise_i8 for one input and one output channel per group. The
// image is quantised once, to channels last; each output pixel is a row whose taps are pointers into it, so
// no patch is copied. What lies outside the image holds the zero point.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

void int8_conv2d(const ConvArgs &args);

} // namespace tautorch
