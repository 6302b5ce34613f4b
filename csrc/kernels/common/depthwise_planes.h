// Depthwise convolution of images in planes (NCHW): a plane is quantised, padded and multiplied where it
// lies.
#pragma once

#include "kernels/common/conv_image.h"

namespace tautorch {

// The 16 bytes around four pixels hold what they see of four columns: strides plus dilation, at most.
constexpr int64_t kPlaneSteps = 5;

// Some rows of output of one channel.
struct DepthwisePlanes {
    const uint8_t *x; // first row under the filter, padded, u8_shifted; 64 bytes can be read at any pixel
    int64_t row;      // bytes from one row to the next
    const Geometry *g;
    const int32_t *weights; // [kh][quads], four columns of the filter each
    int64_t rows, ow;
    int32_t *sums; // [rows][ow], and 15 more are written
};
void depthwise_planes_avx512vnni(const DepthwisePlanes &p);

// Whether depthwise_by_planes is the way for this convolution.
bool depthwise_in_planes(const ConvImage &c, const PackHeader &h, const Output &out);
// Samples [b0, b1).
void depthwise_by_planes(const ConvImage &c, const uint8_t *packed, const Output &out, int64_t b0,
                         int64_t b1);

} // namespace tautorch
