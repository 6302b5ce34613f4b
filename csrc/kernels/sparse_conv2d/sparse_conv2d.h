// sparse_conv2d: int8_conv2d with a sparse weight over (O, I/groups * kh * kw).
//
// Packed by sparse_pack, whose input index is tap * (I/groups) + channel; see sparse_linear. A panel of 64
// or 16 output pixels is gathered tap by tap, one after another: never the whole image's patches.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

void sparse_conv2d(const ConvArgs &args);

} // namespace tautorch
