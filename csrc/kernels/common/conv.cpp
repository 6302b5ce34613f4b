#include "kernels/common/conv.h"

#include "core/parallel.h"
#include "kernels/common/conv_grouped.h"
#include "kernels/common/conv_runs.h"
#include "kernels/common/depthwise_planes.h"
#include "kernels/common/product_planes.h"
#include "kernels/common/window_planes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace tautorch {
namespace {

// Bytes of a band, so that it stays in the second-level cache beside the weights.
constexpr int64_t kBandBytes = 192 * 1024;

// Whether weights have one tap, the whole window.
bool sees_windows(const PackHeader &h, const Geometry &g) {
    return h.kind == PackKind::dense_i8 && h.groups == 1 && g.dw == 1 && g.kh > 1 && g.kw > 1 &&
           h.taps == 1 && h.k == g.kh * g.kw * g.channels;
}

struct Job {
    const ConvArgs &a;
    const PackHeader &h;
    const Isa &isa;
    const ConvImage &c;
    Output out;
    bool depthwise, fused, grouped, windows;

    int64_t groups() const { return depthwise ? 1 : h.groups; }
    int64_t panel_count() const { return depthwise ? div_up(h.groups, kTileN) : panels(h); }
    // Bytes from the first tap to tap t.
    int64_t tap(int64_t t) const {
        if (h.taps == c.g.kh * c.g.kw)
            return t / c.g.kw * c.g.dh * c.row + t % c.g.kw * c.g.dw * c.pixel;
        return t * c.g.dh * c.row;
    }
    int64_t padded_taps() const { return depthwise ? round_up(h.taps, 4) : h.taps; }

    // after: the band that is run next, or null.
    void run(const ConvBand &band, int64_t m0, int64_t m1, int64_t p0, int64_t p1,
             const ConvBand *after = nullptr) const;
    bool moves() const { return fused && direct_output(out); } // pixels of a block may
    bool sorts() const { return !depthwise && !grouped && !windows && columns_differ(c, h, moves()); }
    // Pixels of a block of so many: tiles of 6 and 12 rows without a rest, where they are not put together.
    int64_t block_step(int64_t pixels) const {
        return sorts() ? pixels_together(c) : round_up(block_rows(pixels), 6);
    }
    // A block's windows, one after another.
    const char *windows_of(const ConvBand &band, int64_t m, int rows) const {
        char *out = static_cast<char *>(
            scratch(Scratch::rows, static_cast<size_t>(kBlockRows * window_bytes() + 64)));
        band.windows(m, rows, window_bytes(), out);
        return out;
    }
    int64_t window_bytes() const { return round_up(h.k, h.kr) * operand_bytes(c.kind); }
    void run_depthwise(const ConvBand &band, int64_t m0, int rows, int64_t p0, int64_t p1,
                       const int64_t *taps, const float *scale) const;
};

void Job::run_depthwise(const ConvBand &band, int64_t m0, int rows, int64_t p0, int64_t p1,
                        const int64_t *taps, const float *scale) const {
    alignas(64) int32_t acc[kTileRows * kTileN];
    const int64_t quads = padded_taps() / 4;
    const int8_t *w = reinterpret_cast<const int8_t *>(a.packed + h.data_off);
    for (int64_t p = p0; p < p1; ++p) {
        const int cols = static_cast<int>(std::min<int64_t>(kTileN, h.groups - p * kTileN));
        for (int t0 = 0; t0 < rows; t0 += kTileRows) {
            const int tile = std::min(kTileRows, rows - t0);
            for (int r = 0; r < tile;) { // pixels of one output row at a time
                const int64_t m = m0 + t0 + r;
                const int n = static_cast<int>(std::min<int64_t>(tile - r, c.ow - m % c.ow));
                isa.depthwise(reinterpret_cast<const uint8_t *>(band.pixel(m)) + p * kTileN, taps, quads,
                              c.dx * c.pixel, n, w + p * kTileN * 4 * quads, cols, acc + r * kTileN);
                r += n;
            }
            store_tile(isa, out, acc, kTileN, false, m0 + t0, tile, p * kTileN, cols,
                       scale ? scale + t0 : nullptr);
        }
    }
}

// Outputs of pixels [m0, m1), which lie in the band, and panels [p0, p1).
void Job::run(const ConvBand &band, int64_t m0, int64_t m1, int64_t p0, int64_t p1,
              const ConvBand *after) const {
    const int64_t taps = padded_taps();
    const void **pointers = static_cast<const void **>(
        scratch(Scratch::panel, sizeof(void *) * static_cast<size_t>(taps * (kBlockPixels + 1))));
    int64_t *offset = reinterpret_cast<int64_t *>(pointers + taps * kBlockPixels);
    for (int64_t t = 0; t < taps; ++t)
        offset[t] = t < h.taps ? tap(t) : 0; // what pads a quad of taps has weight 0
    BlockPixels block;
    float scales[kBlockPixels];
    const float *scale = c.kind == OperandKind::f32 ? nullptr : scales;
    const int64_t step = block_step(m1 - m0), group = h.k * operand_bytes(c.kind), pixels = c.oh * c.ow;
    for (int64_t m = m0; m < m1; m += step) {
        const int rows = static_cast<int>(std::min(step, m1 - m));
        if (scale)
            for (int r = 0; r < rows;) {
                const int64_t b = (m + r) / pixels;
                const int n = static_cast<int>(std::min<int64_t>(rows - r, (b + 1) * pixels - m - r));
                std::fill_n(scales + r, n, c.how[b].scale);
                r += n;
            }
        if (depthwise) {
            run_depthwise(band, m, rows, p0, p1, offset, scale);
            continue;
        }
        if (grouped) {
            grouped_product(isa, a.packed, band, m, rows, offset, scale, out);
            continue;
        }
        if (c.in_place) {
            char *copy =
                static_cast<char *>(scratch(Scratch::image, static_cast<size_t>(kBlockRows * c.pixel)));
            const Ahead more = {m + step < m1 ? band.pixel(m + step) : nullptr, rows * c.pixel};
            gemm_stored(isa, a.packed, band.pixel(m), copy, rows, p0, p1, out, m, scale, more);
            continue;
        }
        const Ahead source = after && !windows ? after->source(after->y0 * c.ow + m - m0, rows) : Ahead{};
        if (windows)
            block.fill(windows_of(band, m, rows), window_bytes(), h, rows);
        else
            block.fill(band, h, m, rows, moves());
        if (block.sorted && scale) {
            float in_order[kBlockPixels];
            std::copy_n(scales, rows, in_order);
            for (int r = 0; r < rows; ++r)
                scales[r] = in_order[block.index[r]];
        }
        // Groups lie beside each other in a pixel. What is read past the end of a group has weight 0.
        for (int64_t g = 0; g < groups(); ++g) {
            for (int64_t t = 0; t < taps; ++t) {
                const int64_t shift = offset[t] + g * group;
                for (int r = 0; r < rows; ++r)
                    pointers[t * kBlockPixels + r] = block.at[r] + shift;
            }
            // Each panel serves all runs while it is in the cache. The longest one fetches what comes next.
            const int64_t together = block.count == 1 ? p1 - p0 : 1;
            const int longest = block.longest();
            for (int64_t p = p0; p < p1; p += together) {
                const Ahead next = p + together < p1   ? next_panel(a.packed, g, p)
                                   : g + 1 == groups() ? source
                                                       : Ahead{};
                for (int i = 0; i < block.count; ++i) {
                    const Run &run = block.runs[i];
                    const int at = block.sorted ? 0 : run.first;
                    gemm_block_taps(
                        isa, a.packed, g, pointers + run.taps.tap0 * kBlockPixels + run.first, kBlockPixels,
                        run.rows, run.taps, p, p + together, out, m + at, scale ? scale + run.first : nullptr,
                        block.sorted ? block.index + run.first : nullptr, i == longest ? next : Ahead{});
                }
            }
        }
    }
}

// Output rows [y0, y1) of all samples, of whole samples.
void run_rows(const Job &job, int64_t y0, int64_t y1) {
    const ConvImage &c = job.c;
    if (by_planes(c, job.h, job.out))
        return planes_product(c, job.a.packed, job.out, y0 / c.oh, y1 / c.oh);
    if (job.windows && windows_in_planes(c, job.h, job.out))
        return windows_by_planes(c, job.a.packed, job.out, y0, y1);
    if (depthwise_in_planes(c, job.h, job.out))
        return depthwise_by_planes(c, job.a.packed, job.out, y0 / c.oh, y1 / c.oh);
    const PackHeader &h = job.h;
    const int64_t rows = y1 - y0, count = job.panel_count();
    // An output's way out takes as long as some 32 inputs.
    const int64_t macs = rows * c.ow * h.n * h.groups * (h.k * h.taps * (job.depthwise ? 8 : 1) + 32);
    const int64_t in = rows * c.dy * c.row;
    const int64_t threads = macs < 2'000'000 && h.total < 384 * 1024 && in < 65'536 ? 1 : max_threads();
    const int64_t m0 = y0 * c.ow, m = rows * c.ow;
    const auto share = [&](const ConvBand &band, bool by_output) {
        const int64_t tasks = by_output ? threads : std::min(threads, m);
        parallel_tasks(tasks, [&](int64_t t) {
            if (by_output)
                job.run(band, m0, m0 + m, chunk_begin(count, tasks, t), chunk_begin(count, tasks, t + 1));
            else
                job.run(band, m0 + chunk_begin(m, tasks, t), m0 + chunk_begin(m, tasks, t + 1), 0, count);
        });
    };
    if (c.in_place) // few pixels: weights weigh more than they do
        return share({c, 0, y1, const_cast<char *>(c.x)}, m < 2 * kTileRows && count >= 2 * threads);
    // Threads take bands of whole output rows where these come out even.
    if (div_up(rows, threads) * threads * 25 <= rows * 26) {
        const int64_t least = div_up(job.sorts() ? kBlockPixels : kBlockRows, c.ow);
        parallel_tasks(threads, [&](int64_t t) {
            const int64_t begin = y0 + chunk_begin(rows, threads, t),
                          end = y0 + chunk_begin(rows, threads, t + 1);
            const int64_t most = std::max(least, kBandBytes / std::max<int64_t>(1, c.dy * c.row));
            // Of whole blocks.
            const int64_t unit = job.sorts() ? div_up(pixels_together(c), c.ow) : 1,
                          units = div_up(end - begin, unit),
                          bands = div_up(units, std::max<int64_t>(1, most / unit));
            const auto row = [&](int64_t i) {
                return std::min(end, begin + chunk_begin(units, bands, i) * unit);
            };
            for (int64_t i = 0; i < bands; ++i) {
                const auto nth = [&](int64_t j) { return ConvBand{c, row(j), row(j + 1), nullptr}; };
                ConvBand band = nth(i);
                const ConvBand after = nth(i + 1 < bands ? i + 1 : i);
                band.data = static_cast<char *>(scratch(Scratch::image, band.bytes()));
                band.prepare(0, band.rows());
                job.run(band, band.y0 * c.ow, band.y1 * c.ow, 0, count, i + 1 < bands ? &after : nullptr);
            }
        });
        return;
    }
    // Otherwise they share one copy of the image and the outputs, or the pixels where outputs are few.
    ConvBand band = {c, y0, y1, nullptr};
    band.data = static_cast<char *>(scratch(Scratch::image, band.bytes()));
    const int64_t kept = band.rows(), parts = in < 65'536 ? 1 : std::min(threads, kept);
    parallel_tasks(parts, [&](int64_t t) {
        band.prepare(chunk_begin(kept, parts, t), chunk_begin(kept, parts, t + 1));
    });
    share(band, count >= 2 * threads);
}

} // namespace

bool conv_pack_fits(const PackHeader &h, const Geometry &g) {
    if (h.taps == g.kh * g.kw && h.groups * h.k == g.channels)
        return true;
    if (sees_windows(h, g))
        return true;
    return (h.kind == PackKind::dense_i8 || h.kind == PackKind::dense_w8) && h.groups == 1 && g.dw == 1 &&
           h.taps == g.kh && h.k == g.kw * g.channels;
}

void conv_product(const ConvArgs &a, const Epilogue &e) {
    const PackHeader &h = header_of(a.packed);
    const Isa &isa = *find_isa(h.isa);
    ConvImage c(a, isa, operand_of(a.packed), h.groups > 1 && h.kind != PackKind::depthwise_i8);
    const int64_t batch = a.geometry.batch;
    const bool watch = a.quant.mode == ActQuant::fixed; // float x whose scale is known before it is read
    if (c.kind != OperandKind::f32) {
        char *memory = static_cast<char *>(
            scratch(Scratch::scales, (sizeof(SampleQuant) + 1) * static_cast<size_t>(batch)));
        c.how = reinterpret_cast<SampleQuant *>(memory);
        // A NaN or Inf anywhere makes the whole sample NaN, also where no filter looks.
        const bool look = watch && !c.reads_all();
        if (a.quant.mode == ActQuant::dynamic || look)
            dynamic_quant(isa, a.quant, c.x, batch, c.g.channels * c.g.height * c.g.width, c.how);
        if (a.quant.mode != ActQuant::dynamic)
            for (int64_t b = 0; b < batch; ++b) {
                const bool finite = !look || !std::isnan(c.how[b].scale);
                c.how[b] = quant_of(a.quant, b);
                if (!finite) {
                    c.how[b].scale = std::numeric_limits<float>::quiet_NaN();
                    c.how[b].blank = true;
                }
            }
        if (watch) {
            c.bad = reinterpret_cast<uint8_t *>(memory + sizeof(SampleQuant) * static_cast<size_t>(batch));
            std::memset(c.bad, 0, static_cast<size_t>(batch));
        }
    }
    const bool fused = isa.product_i8 && h.kind == PackKind::dense_i8;
    c.in_place = fused && h.groups == 1 && h.taps == 1 && h.k % h.kr == 0 &&
                 a.quant.mode == ActQuant::given && c.stored();
    const Job job = {a,
                     h,
                     isa,
                     c,
                     image_output(e, a.out, a.out_channels_last, a.geometry, a.outputs),
                     h.kind == PackKind::depthwise_i8,
                     fused,
                     h.kind == PackKind::grouped_i8,
                     sees_windows(h, c.g)};
    run_rows(job, 0, batch * c.oh);
    // Samples with NaN or Inf were only found out on the way: they are blank, and run again.
    for (int64_t b = 0; watch && b < batch; ++b)
        if (c.bad[b]) {
            c.how[b].scale = std::numeric_limits<float>::quiet_NaN();
            c.how[b].blank = true;
            run_rows(job, b * c.oh, (b + 1) * c.oh);
        }
}

} // namespace tautorch
