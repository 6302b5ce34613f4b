// Products by strips: packs of cells (cells.h) and of 2:4 weights (pairs.h).
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

// Whether a pack is one of these.
bool runs_by_strips(const PackHeader &h);
void strips_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out);
// The same for rows of a matrix, which each thread prepares for itself where that costs less than a join.
void strips_linear(const LinearArgs &a, const Output &out);

} // namespace tautorch
