// The pixels of a block of a convolution, put together by the taps that they see.
#pragma once

#include "kernels/common/conv_image.h"

namespace tautorch {

// Pixels of a block, and the taps that they see.
struct Run {
    int first, rows;
    Taps taps;
};

// Whether pixels of a block may be put together by the columns of the filter that they see. move: any may,
// else only neighbours.
bool columns_differ(const ConvImage &c, const PackHeader &h, bool move);
// Pixels of a block whose pixels are so put together: whole images, else output rows, in sixes where the
// block takes as many: most pixels that see the same then fill tiles of six.
int64_t pixels_together(const ConvImage &c);

struct BlockPixels {
    const char *at[kBlockPixels]; // each pixel's first tap
    int32_t index[kBlockPixels];  // its place in the block
    Run runs[kBlockPixels];       // every pixel is in one
    int count = 0;
    bool sorted = false; // index is not 0, 1, 2 ...

    int longest() const {
        int most = 0;
        for (int i = 1; i < count; ++i)
            if (runs[i].rows > runs[most].rows)
                most = i;
        return most;
    }

    // Pixels [m, m + rows). What lies outside the image is left out where the operand there is 0: rows of the
    // filter, and its columns where a row of it is one tap. move: pixels that see the same may be put
    // together, else only neighbours are.
    void fill(const ConvBand &band, const PackHeader &h, int64_t m, int rows, bool move);
    // Windows of `bytes`, one after another, which are the one tap there is.
    void fill(const char *first, int64_t bytes, const PackHeader &h, int rows);
};

} // namespace tautorch
