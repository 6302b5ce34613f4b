// Depthwise convolution of images in planes (NCHW): a plane is quantised, padded and multiplied where it
// lies.
#pragma once

#include "kernels/common/conv_image.h"

namespace tautorch {

// The 16 bytes around four pixels hold what they see of four columns: strides plus dilation, at most.
constexpr int64_t kPlaneSteps = 5;

// Some rows of output of several channels.
struct DepthwisePlanes {
    const Geometry *g;
    int64_t planes, rows, ow;
    // First row under the filter, padded, u8_shifted; 64 bytes can be read at any pixel.
    const uint8_t *x;
    int64_t row, x_step;    // bytes to the next row and plane
    const int32_t *weights; // [kh][quads], four columns of the filter each
    int64_t weights_step;
    int32_t *sums; // [rows][ow] of each plane, sums_step apart; 15 more are written
    int64_t sums_step;
};
void depthwise_planes_avx512vnni(const DepthwisePlanes &p);

// Whether depthwise_by_planes is the way for this convolution.
bool depthwise_in_planes(const ConvImage &c, const PackHeader &h, const Output &out);
// Samples [b0, b1).
void depthwise_by_planes(const ConvImage &c, const uint8_t *packed, const Output &out, int64_t b0,
                         int64_t b1);

} // namespace tautorch
