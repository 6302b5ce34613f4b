// The padded, quantised copy of a band of an image that conv.cpp multiplies.
#pragma once

#include "kernels/common/product.h"

#include <cstddef>

namespace tautorch {

// Pixels that one pass over the weights serves, at most: six rows of 56, six images of 7 x 7.
constexpr int kBlockPixels = 336;

// What does not depend on the band.
struct ConvImage {
    const Isa *isa;
    OperandKind kind;
    Geometry g;
    const char *x;
    DType dtype;
    bool channels_last;
    SampleQuant *how; // [batch]
    uint8_t *bad;     // [batch], set where a NaN or Inf was met; null if nobody asks
    int32_t pad;      // operand outside the image

    int64_t oh, ow;
    // Filters of one row or column leave out what the stride leaves out: input rows between kept ones, and
    // kept rows between outputs.
    int64_t keep_y, keep_x, dy, dx;
    // Kept pixels in a row; bytes of a pixel and of a row. Between groups' pixels at a multiple of 512 bytes
    // lies a cache line: all pixels of a tile would share a few sets of the first-level cache.
    int64_t cols, pixel, row;
    bool in_place = false; // no band: int8 x, stored(), is taken a block of pixels at a time

    ConvImage(const ConvArgs &a, const Isa &isa, OperandKind kind, bool grouped);
    SampleQuant quant(int64_t b) const { return how ? how[b] : SampleQuant{}; }
    void met(int64_t b, bool finite) const {
        if (!finite && bad)
            __atomic_store_n(bad + b, uint8_t{1}, __ATOMIC_RELAXED);
    }
    bool packed() const { return pixel == g.channels * operand_bytes(kind); } // no gap between pixels
    int64_t extent() const { return g.dh * (g.kh - 1) + 1; }                  // kept rows under a filter
    // Whether x has just the kept pixels, one after another.
    bool stored() const { return channels_last && pointwise(); }
    bool pointwise() const {
        return g.kh == 1 && g.kw == 1 && g.sh == 1 && g.sw == 1 && g.ph == 0 && g.pw == 0;
    }
    // Whether some band looks at every pixel of x.
    bool reads_all() const {
        return keep_x == 1 && keep_y == 1 && g.sh <= extent() &&
               (oh - 1) * g.sh - g.ph + extent() >= g.height &&
               (ow - 1) * g.sw - g.pw + g.dw * (g.kw - 1) + 1 >= g.width;
    }
};

// Output rows [y0, y1) of all samples, counted through, and the kept rows under them. Samples do not share
// rows.
struct ConvBand {
    const ConvImage &c;
    int64_t y0, y1;
    char *data;

    int64_t rows() const { return row_of(y1 - 1) + c.extent(); }
    // First kept row under output row y.
    int64_t row_of(int64_t y) const {
        const int64_t b = y / c.oh - y0 / c.oh, oy = y % c.oh, first = y0 % c.oh;
        if (b == 0)
            return (oy - first) * c.dy;
        const int64_t whole = (c.oh - 1) * c.dy + c.extent();
        return whole - first * c.dy + (b - 1) * whole + oy * c.dy;
    }
    const char *pixel(int64_t m) const { return data + row_of(m / c.ow) * c.row + m % c.ow * c.dx * c.pixel; }
    // About the part of x that pixels [m, m + rows) are the first to look at, where it lies together and the
    // second-level cache takes all of the band's beside another band.
    Ahead source(int64_t m, int rows) const;
    size_t bytes() const { return static_cast<size_t>(rows() * c.row + 128); }

    // Writes kept rows [r0, r1).
    void prepare(int64_t r0, int64_t r1) const;
    // What pixels [m, m + rows) see, row after row of the filter, to out, `step` bytes from one pixel to the
    // next. Filters without dilation along a row. 64 bytes more are written.
    void windows(int64_t m, int rows, int64_t step, char *out) const;
};

} // namespace tautorch
