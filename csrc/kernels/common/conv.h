// Convolution as an implicit GEMM over a padded copy of the image.
//
// A thread quantises a band of the image into its own scratch, with the padding written out, and multiplies
// it while it is in the cache. Every tap of every output pixel is then at a constant distance from the
// pixel's first one: no test for the border, no pointer per pixel but the first, no join between quantising
// and multiplying.
//
// Packs (dense_i8, dense_w8; n outputs per group) come in three forms:
//   taps = kh * kw, k = channels of a group             any convolution
//   taps = kh,      k = kw * channels, groups = 1, dw = 1   a whole row of the filter is one run of memory,
//   so
//                                                       that only the row is padded to whole groups of kr,
//                                                       not each tap: 3 channels fill 21 of 24 places, not 3
//                                                       of 4
//   taps = 1, k = kh * kw * channels, as above          few channels: what a pixel's filter sees is put
//                                                       together, in whole groups of kr. dense_i8 alone
// depthwise_i8 and grouped_i8 have kernels of their own.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

// Whether weights packed with this header are ones of this convolution.
bool conv_pack_fits(const PackHeader &h, const Geometry &g);

// Runs dense_i8, dense_w8, depthwise_i8 and grouped_i8 packs. `e` has its correction filled in.
void conv_product(const ConvArgs &a, const Epilogue &e);

} // namespace tautorch
