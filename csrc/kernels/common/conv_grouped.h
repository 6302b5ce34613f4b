// grouped_i8 packs (see grouped.h) over a band of an image.
#pragma once

#include "kernels/common/conv_image.h"

namespace tautorch {

// Outputs of pixels [m0, m0 + rows), at most kBlockPixels, taps at these distances from a pixel's first.
void grouped_product(const Isa &isa, const uint8_t *packed, const ConvBand &band, int64_t m0, int rows,
                     const int64_t *taps, const float *scale, const Output &out);

} // namespace tautorch
