#include "kernels/common/conv_runs.h"

#include <algorithm>

namespace tautorch {
namespace {

struct Range {
    int64_t begin, end;
};

// Which of `taps` taps, `step` apart, from input `first` on, lie inside [0, size): all if none does.
Range inside(int64_t first, int64_t taps, int64_t step, int64_t size) {
    const int64_t begin = first < 0 ? div_up(-first, step) : 0;
    const int64_t end = first < size ? std::min(taps, (size - 1 - first) / step + 1) : 0;
    return begin < end ? Range{begin, end} : Range{0, taps};
}

bool skips_padding(const ConvImage &c) {
    return c.pad == 0 && c.kind != OperandKind::f32 && !c.isa->even_rows;
}

} // namespace

bool columns_differ(const ConvImage &c, const PackHeader &h, bool move) {
    const Geometry &g = c.g;
    // A filter row that is one tap: a part of it must be whole groups of kr inputs.
    return skips_padding(c) && move && g.pw > 0 && h.taps == g.kh && g.kw > 1 && g.channels % h.kr == 0;
}

int64_t pixels_together(const ConvImage &c) {
    const int64_t image = c.oh * c.ow;
    if (image <= kBlockPixels)
        return kBlockPixels / image * image;
    const int64_t rows = kBlockPixels / c.ow;
    return rows >= 6 ? rows / 6 * 6 * c.ow : rows > 0 ? rows * c.ow : kBlockPixels;
}

void BlockPixels::fill(const ConvBand &band, const PackHeader &h, int64_t m, int rows, bool move) {
    const ConvImage &c = band.c;
    const Geometry &g = c.g;
    const bool skip = skips_padding(c), columns = columns_differ(c, h, move);
    // Output columns [left, right) see all columns of the filter.
    const int64_t left = columns ? std::min(c.ow, div_up(g.pw, g.sw)) : 0;
    const int64_t last = g.width + g.pw - g.kw;
    const int64_t right = columns ? std::max(left, std::min(c.ow, last < 0 ? 0 : last / g.sw + 1)) : c.ow;
    const int64_t per_row = h.taps / g.kh;
    struct Piece {
        int first, rows, run;
    } pieces[kBlockPixels];
    int n_pieces = 0;
    count = 0;
    const auto add = [&](int r, int n, const Taps &t) {
        int run = move ? 0 : std::max(0, count - 1);
        while (run < count && !(runs[run].taps == t))
            ++run;
        if (run == count)
            runs[count++] = {0, 0, t};
        runs[run].rows += n;
        pieces[n_pieces++] = {r, n, run};
    };
    for (int r = 0; r < rows;) { // one output row at a time
        const int64_t ox = (m + r) % c.ow, oy = (m + r) / c.ow % c.oh;
        const int n = static_cast<int>(std::min<int64_t>(rows - r, c.ow - ox));
        const Range y = skip ? inside(oy * g.sh - g.ph, g.kh, g.dh, g.height) : Range{0, g.kh};
        Taps t = {y.begin * per_row, y.end * per_row, 0, h.k};
        for (int i = 0; i < n;) {
            const int64_t x = ox + i;
            int part = n - i;
            t.k0 = 0;
            t.k1 = h.k;
            if (x >= left && x < right) {
                part = static_cast<int>(std::min<int64_t>(part, right - x));
            } else if (columns) {
                const Range seen = inside(x * g.sw - g.pw, g.kw, 1, g.width);
                t.k0 = seen.begin * g.channels;
                t.k1 = seen.end * g.channels;
                part = 1;
            }
            add(r + i, part, t);
            i += part;
        }
        r += n;
    }
    int next = 0;
    for (int i = 0; i < count; ++i) {
        runs[i].first = next;
        next += runs[i].rows;
        runs[i].rows = 0;
    }
    sorted = false;
    for (int i = 0; i < n_pieces; ++i) {
        const Piece &p = pieces[i];
        Run &run = runs[p.run];
        const int to = run.first + run.rows;
        sorted |= to != p.first;
        const char *first = band.pixel(m + p.first) + run.taps.k0 * operand_bytes(c.kind);
        for (int j = 0; j < p.rows; ++j) {
            at[to + j] = first + j * c.dx * c.pixel;
            index[to + j] = p.first + j;
        }
        run.rows += p.rows;
    }
}

void BlockPixels::fill(const char *first, int64_t bytes, const PackHeader &h, int rows) {
    for (int r = 0; r < rows; ++r)
        at[r] = first + r * bytes;
    runs[0] = {0, rows, {0, 1, 0, h.k}};
    count = 1;
    sorted = false;
}

} // namespace tautorch
