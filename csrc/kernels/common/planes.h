// Elements of x to operands of a product, as they lie or from planes of channels to pixels.
#pragma once

#include "kernels/common/source.h"

namespace tautorch {

constexpr int64_t kPlaneStrip = 64; // pixels that are turned at once

// n elements -> operands. False if they had to be finite and are not.
bool to_operands(const Isa &isa, OperandKind kind, DType dtype, const SampleQuant &q, const void *x,
                 int64_t n, void *out);

// The same of pixels of planes, `plane` bytes apart: channel c of pixel p to out + p * step + c operands.
// Nothing past the last pixel's channels is written.
bool planes_to_operands(const Isa &isa, OperandKind kind, DType dtype, const SampleQuant &q, const void *x,
                        int64_t plane, int64_t channels, int64_t pixels, char *out, int64_t step);

} // namespace tautorch
