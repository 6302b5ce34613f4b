// The pixels of a block of a convolution, put together by the taps that they see.
#pragma once

#include "kernels/common/conv_image.h"

namespace tautorch {

// Pixels of a block, and the taps that they see.
struct Run {
    int first, rows;
    Taps taps;
};

struct BlockPixels {
    const char *at[kBlockRows]; // each pixel's first tap
    int32_t index[kBlockRows];  // its place in the block
    Run runs[kBlockRows];       // every pixel is in one
    int count = 0;
    bool sorted = false; // index is not 0, 1, 2 ...

    // Pixels [m, m + rows). What lies outside the image is left out where the operand there is 0: rows of the
    // filter, and its columns where a row of it is one tap. move: pixels that see the same may be put
    // together, else only neighbours are.
    void fill(const ConvBand &band, const PackHeader &h, int64_t m, int rows, bool move);
    // Windows of `bytes`, one after another, which are the one tap there is.
    void fill(const char *first, int64_t bytes, const PackHeader &h, int rows);
};

} // namespace tautorch
