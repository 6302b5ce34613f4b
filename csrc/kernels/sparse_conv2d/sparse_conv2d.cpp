#include "kernels/sparse_conv2d/sparse_conv2d.h"

#include "kernels/int8_conv2d/int8_conv2d.h"

namespace tautorch {

// The pack's kind tells the product which kernel runs; all else is a convolution like any other.
void sparse_conv2d(const ConvArgs &a) { int8_conv2d(a); }

} // namespace tautorch
