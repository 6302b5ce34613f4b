#include "kernels/common/window_planes.h"

#include "core/parallel.h"
#include "kernels/common/product_planes.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

constexpr int64_t kBandBytes = 128 * 1024; // of padded rows, which stay in L2 beside the weights
constexpr int64_t kMostStride = 4;

// Padded rows of bytes, of all channels. Columns that lie a stride apart follow each other, so that what
// pixels of an output row see of one place in their windows is a run of bytes.
struct PaddedRows {
    const ConvImage &c;
    int64_t stride, run; // bytes of every stride-th column, and 64 to be read past the last one
    uint8_t *rows, *line;

    PaddedRows(const ConvImage &image, uint8_t *memory)
        : c(image), stride(c.g.sw), run(div_up(c.g.width + 2 * c.g.pw, stride) + kPlanePixels), rows(memory),
          line(nullptr) {}
    int64_t row_bytes() const { return c.g.channels * stride * run; }
    // Of the run at a place of the window, from that of its first.
    int64_t at(int64_t ky, int64_t kx, int64_t channel) const {
        return ky * c.g.dh * row_bytes() + (channel * stride + kx % stride) * run + kx / stride;
    }
    // Input row iy, which may lie outside, of sample b to row r.
    void fill(int64_t b, int64_t iy, int64_t r) const {
        const Geometry &g = c.g;
        uint8_t *to = rows + r * row_bytes();
        const SampleQuant q = c.quant(b);
        if (iy < 0 || iy >= g.height) {
            std::memset(to, c.pad, static_cast<size_t>(row_bytes()));
            return;
        }
        for (int64_t i = 0; i < g.channels; ++i, to += stride * run) {
            uint8_t *whole = stride == 1 ? to : line;
            std::memset(whole, c.pad, static_cast<size_t>(stride * run));
            if (q.blank)
                std::memset(whole + g.pw, q.zp + operand_shift(c.kind), static_cast<size_t>(g.width));
            else
                c.met(b, c.isa->quantize(
                             c.x + (((b * g.channels + i) * g.height + iy) * g.width) * size_of(c.dtype),
                             c.dtype, g.width, q.inv, q.zp, q.lo, q.hi, c.isa->act, whole + g.pw));
            if (stride == 2) // vectorised
                for (int64_t j = 0; j < run; ++j) {
                    to[j] = line[2 * j];
                    to[run + j] = line[2 * j + 1];
                }
            else if (stride > 2)
                for (int64_t j = 0; j < run; ++j)
                    for (int64_t s = 0; s < stride; ++s)
                        to[s * run + j] = line[stride * j + s];
        }
    }
};

} // namespace

bool windows_in_planes(const ConvImage &c, const PackHeader &h, const Output &out) {
    const Geometry &g = c.g;
    // Of a row's last vector of 16 pixels most are there.
    return c.isa->words_of_runs && h.kind == PackKind::dense_i8 && !c.channels_last && out.along_m &&
           g.sw <= kMostStride && 7 * round_up(c.ow, 16) <= 8 * c.ow &&
           c.extent() * PaddedRows(c, nullptr).row_bytes() <= kBandBytes;
}

void windows_by_planes(const ConvImage &c, const uint8_t *packed, const Output &out, int64_t y0, int64_t y1) {
    const PackHeader &h = header_of(packed);
    const Geometry &g = c.g;
    const int64_t quads = div_up(h.k, h.kr), count = panels(h);
    const int64_t threads = threads_for((y1 - y0) * c.ow * h.n * (h.k + 32), h.total),
                  tasks = std::min(threads, y1 - y0);
    parallel_tasks(tasks, [&](int64_t t) {
        PaddedRows image(c, nullptr);
        const int64_t most = std::max<int64_t>(1, (kBandBytes / image.row_bytes() - c.extent()) / g.sh + 1);
        const size_t band = static_cast<size_t>(((most - 1) * g.sh + c.extent()) * image.row_bytes());
        image.rows = static_cast<uint8_t *>(
            scratch(Scratch::image, band + static_cast<size_t>(image.stride * image.run)));
        image.line = image.rows + band;
        uint32_t *words =
            static_cast<uint32_t *>(scratch(Scratch::panel, static_cast<size_t>(4 * quads * kPlanePixels)));
        int64_t *runs = static_cast<int64_t *>(scratch(Scratch::pointers, static_cast<size_t>(32 * quads)));
        for (int64_t i = 0; i < 4 * quads; ++i) // what is too much has weight 0
            runs[i] = i < h.k ? image.at(i / (g.kw * g.channels), i / g.channels % g.kw, i % g.channels) : 0;
        alignas(64) int32_t sums[kTileN * kPlanePixels];
        float scales[kPlanePixels];
        const int64_t end = y0 + chunk_begin(y1 - y0, tasks, t + 1);
        for (int64_t y = y0 + chunk_begin(y1 - y0, tasks, t); y < end;) {
            // Rows of one sample.
            const int64_t b = y / c.oh, oy = y % c.oh, rows = std::min({most, end - y, c.oh - oy});
            for (int64_t r = 0; r < (rows - 1) * g.sh + c.extent(); ++r)
                image.fill(b, oy * g.sh - g.ph + r, r);
            std::fill_n(scales, kPlanePixels, c.quant(b).scale);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t at = 0; at < c.ow; at += kPlanePixels) {
                    const int pixels = static_cast<int>(std::min<int64_t>(kPlanePixels, c.ow - at));
                    c.isa->words_of_runs(image.rows + r * g.sh * image.row_bytes() + at, runs, quads, words);
                    planes_strip(*c.isa, packed, words, 0, count, out, b, (oy + r) * c.ow + at, pixels,
                                 scales, sums);
                }
            y += rows;
        }
    });
}

} // namespace tautorch
