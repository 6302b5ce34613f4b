// Dense int8 filters that look at a pixel's whole window at once, of few channels, over images in planes
// (NCHW).
#pragma once

#include "kernels/common/conv_image.h"

namespace tautorch {

// out[q][p] = bytes p of the four runs x + runs[4 q ..], p < kPlanePixels. 64 bytes of a run are read.
void words_of_runs_avx512vnni(const uint8_t *x, const int64_t *runs, int64_t quads, uint32_t *out);

// Whether windows_by_planes is the way for this convolution, whose weights have one tap, the whole window.
bool windows_in_planes(const ConvImage &c, const PackHeader &h, const Output &out);
// Output rows [y0, y1) of all samples.
void windows_by_planes(const ConvImage &c, const uint8_t *packed, const Output &out, int64_t y0, int64_t y1);

} // namespace tautorch
