#include "kernels/common/conv_image.h"

#include "core/parallel.h"
#include "kernels/common/planes.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

constexpr int64_t kMostAhead = 256 * 1024; // bytes of x, which a band of floats has more of

void fill_operands(OperandKind kind, int32_t value, int64_t n, char *out) {
    if (kind == OperandKind::f32)
        std::memset(out, 0, static_cast<size_t>(4 * n));
    else if (kind == OperandKind::s16)
        std::fill_n(reinterpret_cast<int16_t *>(out), n, static_cast<int16_t>(value));
    else
        std::memset(out, value, static_cast<size_t>(n));
}

// n elements at x of sample b -> operands.
void convert(const ConvImage &c, int64_t b, const char *x, int64_t n, char *out) {
    c.met(b, to_operands(*c.isa, c.kind, c.dtype, c.quant(b), x, n, out));
}

// One kept row of a band, or several without padding between them, from input row iy on.
struct Rows {
    const ConvImage &c;
    int64_t b;      // sample
    int64_t x0, nx; // input column of the first kept pixel inside the image, and how many are
    char *first;    // where that pixel goes in the first row

    // Pixels [p0, p0 + n) of the plane, all of one row: to where they belong.
    void place(const char *pixels, int64_t x, int64_t n, char *row) const {
        if (c.keep_x == 1) {
            const int64_t from = std::max(x, x0), to = std::min(x + n, x0 + nx);
            if (from < to)
                std::memcpy(row + (from - x0) * c.pixel, pixels + (from - x) * c.pixel,
                            static_cast<size_t>((to - from) * c.pixel));
            return;
        }
        for (int64_t i = 0; i < nx; ++i) {
            const int64_t at = x0 + i * c.keep_x - x;
            if (at >= 0 && at < n)
                std::memcpy(row + i * c.pixel, pixels + at * c.pixel, static_cast<size_t>(c.pixel));
        }
    }

    void nchw(int64_t iy, int64_t count) const {
        const Geometry &g = c.g;
        const int64_t plane = g.height * g.width, in_size = size_of(c.dtype);
        const char *x = c.x + b * g.channels * plane * in_size;
        const auto turn = [&](int64_t pixel, int64_t n, char *out) {
            c.met(b, planes_to_operands(*c.isa, c.kind, c.dtype, c.quant(b), x + pixel * in_size,
                                        plane * in_size, g.channels, n, out, c.pixel));
        };
        const bool direct = c.keep_x == 1 && nx == g.width && c.cols == g.width;
        char *turned = static_cast<char *>(
            direct ? nullptr : scratch(Scratch::rows, static_cast<size_t>(kPlaneStrip * c.pixel)));
        // Kept rows lie one after another in every plane unless rows are left out between.
        const int64_t run = c.keep_y == 1 ? count : 1;
        for (int64_t r0 = 0; r0 < count; r0 += run) {
            const int64_t begin = (iy + r0 * c.keep_y) * g.width, end = begin + run * g.width;
            if (direct) {
                turn(begin, end - begin, first + r0 * c.row);
                continue;
            }
            for (int64_t p0 = begin; p0 < end; p0 += kPlaneStrip) {
                const int64_t n = std::min(kPlaneStrip, end - p0);
                turn(p0, n, turned);
                for (int64_t p = p0; p < p0 + n;) {
                    const int64_t at = p % g.width, left = std::min(p0 + n - p, g.width - at);
                    place(turned + (p - p0) * c.pixel, at, left,
                          first + (r0 + (p - begin) / g.width) * c.row);
                    p += left;
                }
            }
        }
    }

    void nhwc(int64_t iy, int64_t count) const {
        const Geometry &g = c.g;
        const int64_t in_pixel = g.channels * size_of(c.dtype);
        const char *x = c.x + b * g.height * g.width * in_pixel;
        if (c.packed() && c.keep_x == 1 && c.keep_y == 1 && nx == g.width && c.cols == g.width) {
            convert(c, b, x + iy * g.width * in_pixel, count * g.width * g.channels, first);
            return;
        }
        for (int64_t r = 0; r < count; ++r) {
            const char *from = x + ((iy + r * c.keep_y) * g.width + x0) * in_pixel;
            char *to = first + r * c.row;
            if (c.keep_x == 1 && c.packed())
                convert(c, b, from, nx * g.channels, to);
            else
                for (int64_t i = 0; i < nx; ++i)
                    convert(c, b, from + i * c.keep_x * in_pixel, g.channels, to + i * c.pixel);
        }
    }
};

} // namespace

ConvImage::ConvImage(const ConvArgs &a, const Isa &i, OperandKind k, bool grouped)
    : isa(&i), kind(k), g(a.geometry), x(static_cast<const char *>(a.x)), dtype(a.quant.dtype),
      channels_last(a.channels_last), how(nullptr), bad(nullptr),
      pad((a.quant.mode == ActQuant::dynamic || k == OperandKind::f32 ? 0 : a.quant.zero_point) +
          operand_shift(k)),
      oh(g.out_height()), ow(g.out_width()), keep_y(g.kh == 1 ? g.sh : 1), keep_x(g.kw == 1 ? g.sw : 1),
      dy(g.kh == 1 ? 1 : g.sh), dx(g.kw == 1 ? 1 : g.sw), cols((ow - 1) * dx + g.dw * (g.kw - 1) + 1),
      pixel(g.channels * operand_bytes(k)), row(0) {
    if (grouped && pixel % 512 == 0)
        pixel += 64;
    row = cols * pixel;
}

void ConvBand::prepare(int64_t r0, int64_t r1) const {
    const Geometry &g = c.g;
    const int64_t size = operand_bytes(c.kind);
    // Kept pixels [left, right) of a row lie inside the image.
    const int64_t left = std::min(c.cols, div_up(g.pw, c.keep_x));
    const int64_t right = std::max(left, std::min(c.cols, div_up(g.width + g.pw, c.keep_x)));
    const int64_t last = (y1 - 1) / c.oh;
    for (int64_t b = y0 / c.oh; b <= last; ++b) {
        const int64_t oy = b == y0 / c.oh ? y0 % c.oh : 0, end = b == last ? (y1 - 1) % c.oh + 1 : c.oh;
        const int64_t start = row_of(b * c.oh + oy), count = (end - 1 - oy) * c.dy + c.extent();
        const int64_t from = std::max(r0 - start, int64_t{0}), to = std::min(r1 - start, count);
        // Kept row r of this sample is input row top + r * keep_y.
        const int64_t top = oy * g.sh - g.ph;
        const auto inside = [&](int64_t r) {
            const int64_t iy = top + r * c.keep_y;
            return iy >= 0 && iy < g.height;
        };
        for (int64_t r = from; r < to;) {
            char *out = data + (start + r) * c.row;
            if (!inside(r) || left == right) {
                fill_operands(c.kind, c.pad, c.row / size, out);
                ++r;
                continue;
            }
            int64_t n = 1;
            while (r + n < to && inside(r + n))
                ++n;
            const Rows rows = {c, b, left * c.keep_x - g.pw, right - left, out + left * c.pixel};
            if (c.channels_last)
                rows.nhwc(top + r * c.keep_y, n);
            else
                rows.nchw(top + r * c.keep_y, n);
            for (int64_t i = 0; i < n && right - left < c.cols; ++i, out += c.row) {
                fill_operands(c.kind, c.pad, left * c.pixel / size, out);
                fill_operands(c.kind, c.pad, (c.cols - right) * c.pixel / size, out + right * c.pixel);
            }
            r += n;
        }
    }
}

Ahead ConvBand::source(int64_t m, int rows) const {
    const Geometry &g = c.g;
    const int64_t pixel = g.channels * size_of(c.dtype);
    if (!c.channels_last || c.keep_x > 1 || c.keep_y > 1 || (y1 - y0) * c.dy * g.width * pixel > kMostAhead)
        return {};
    const int64_t y = m / c.ow, b = y / c.oh, shared = std::max(int64_t{0}, c.extent() - g.sh);
    const int64_t iy = std::clamp(y % c.oh * g.sh - g.ph + shared, int64_t{0}, g.height - 1),
                  ix = std::min(m % c.ow * g.sw, g.width - 1);
    return {c.x + ((b * g.height + iy) * g.width + ix) * pixel, rows * g.sh * g.sw * pixel};
}

namespace {

// Size: of a copy, at least n; each is written over where it is too long. 0: n.
template <int Size>
void copy_windows(const ConvBand &band, int64_t m, int rows, int64_t n, int64_t step, char *out) {
    const ConvImage &c = band.c;
    const int64_t right = c.dx * c.pixel, below = c.g.dh * c.row;
    for (int r = 0; r < rows;) { // pixels of one output row at a time
        const char *first = band.pixel(m + r);
        const int run = static_cast<int>(std::min<int64_t>(rows - r, c.ow - (m + r) % c.ow));
        for (int i = 0; i < run; ++i, first += right, out += step) {
            const char *from = first;
            char *to = out;
            for (int64_t y = 0; y < c.g.kh; ++y, from += below, to += n)
                std::memcpy(to, from, Size > 0 ? Size : static_cast<size_t>(n));
        }
        r += run;
    }
}

} // namespace

void ConvBand::windows(int64_t m, int rows, int64_t step, char *out) const {
    const int64_t n = c.g.kw * c.pixel;
    const auto copy = n <= 4    ? copy_windows<4>
                      : n <= 8  ? copy_windows<8>
                      : n <= 16 ? copy_windows<16>
                      : n <= 32 ? copy_windows<32>
                      : n <= 64 ? copy_windows<64>
                                : copy_windows<0>;
    copy(*this, m, rows, n, step, out);
}

} // namespace tautorch
