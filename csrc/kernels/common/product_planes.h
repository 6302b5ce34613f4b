// Dense int8 weights times an image in planes whose pixels are those of the output.
#pragma once

#include "kernels/common/conv_image.h"

namespace tautorch {

constexpr int kPlanePixels = 64; // of a strip

// A panel of weights as product_i8 takes it times a strip of pixels.
struct ProductPlanes {
    const uint32_t
        *words; // [kq][kPlanePixels]: four channels of a pixel each, u8_shifted; aligned to 64 bytes
    int pixels; // 1 .. kPlanePixels; whole groups of 16 are read
    int64_t kq;
    const int8_t *panel;
    int width, cols;   // of the panel, and how many of its outputs are there
    const char *line;  // where the first output's pixels will go, to be fetched meanwhile
    int64_t line_step; // bytes from one output's to the next
    int size;          // of an output
    int32_t *sums;     // [cols][kPlanePixels], whole groups of 16 written; aligned to 64 bytes
};
void product_planes_avx512vnni(const ProductPlanes &p);

// Words of a strip of pixels, as product_planes takes them, times panels [p0, p1): to sample b's pixels from
// `at` on. sums has room for [kTileN][kPlanePixels], aligned to 64 bytes.
void planes_strip(const Isa &isa, const uint8_t *packed, const uint32_t *words, int64_t p0, int64_t p1,
                  const Output &out, int64_t b, int64_t at, int pixels, const float *scales, int32_t *sums);

// Whether planes_product is the way for this convolution: dense int8 or lists.
bool by_planes(const ConvImage &c, const PackHeader &h, const Output &out);
// Samples [b0, b1).
void planes_product(const ConvImage &c, const uint8_t *packed, const Output &out, int64_t b0, int64_t b1);

} // namespace tautorch
