// sparse_linear: int8_linear with a weight most of whose elements are zero.
//
// Packed by sparse_pack: outputs in groups of 1 (unstructured) or 4 (4x1, and every larger block) that share
// a list of kept inputs; int8 (sparse_i8) or float (sparse_f32). Rows of x are turned into an input-major
// panel of 64 or 16 rows, so that a kept weight is one broadcast. Where the kernel has them,
// int8 values also run in other forms: SELL (sell.h), whole blocks (cells.h) and 2:4 (pairs.h). Dense packs
// run too: 2:4 elsewhere, and weights of more than 65536 inputs, which a 16-bit index cannot name.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

void sparse_linear(const LinearArgs &args);

} // namespace tautorch
