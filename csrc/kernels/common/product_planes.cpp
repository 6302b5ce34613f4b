#include "kernels/common/product_planes.h"

#include "core/parallel.h"
#include "kernels/common/sell.h"
#include "kernels/common/strips.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

// A strip of pixels: the first of them, how many, and of which sample.
struct Strip {
    int64_t b, at;
    int count;
};

// Rates of sell.h: what turning an image takes, an input, and its outputs, an output. Measured on Zen 4.
constexpr double kTurnInput = 0.4, kTurnOutput = 0.5;

// Inputs up to which planes are faster than pixels turned for AMX: 1.7 and 1.1 times at 64 and 256, 0.75
// times at 512.
constexpr int64_t kFewForTiles = 256;

// A strip costs 64 pixels however few it holds, where pixels of several samples, turned, fill a panel.
bool lists_pay(const PackHeader &h, int64_t samples, int64_t pixels) {
    const int64_t m = samples * pixels;
    const double turned = sell_preferred(h, m) ? sell_cost(h, m) : lists_cost(h, m);
    const double turns = static_cast<double>(m) *
                         (kTurnInput * static_cast<double>(h.k) + kTurnOutput * static_cast<double>(h.n));
    return lists_cost(h, samples * round_up(pixels, kPlanePixels)) < turned + turns;
}

// Four channels of a pixel a word.
void words_of(const ConvImage &c, const Strip &s, uint8_t *out) {
    const Geometry &g = c.g;
    const SampleQuant q = c.quant(s.b);
    const int64_t size = size_of(c.dtype), plane = g.height * g.width * size;
    const char *x = c.x + s.b * g.channels * plane + s.at * size;
    bool finite = true;
    for (int64_t i = 0; i < g.channels; i += 4, out += 4 * kPlanePixels)
        finite &= c.isa->quantize_quads(x + i * plane, c.dtype, plane,
                                        static_cast<int>(std::min<int64_t>(4, g.channels - i)), s.count,
                                        q.inv, q.zp, q.lo, q.hi, reinterpret_cast<uint32_t *>(out));
    c.met(s.b, finite);
}

void panel_of(const ConvImage &c, const Strip &s, uint8_t *out) {
    const Geometry &g = c.g;
    const SampleQuant q = c.quant(s.b);
    const int64_t size = size_of(c.dtype), plane = g.height * g.width * size;
    c.met(s.b, c.isa->quantize_panel(c.x + s.b * g.channels * plane + s.at * size, c.dtype, plane, g.channels,
                                     s.count, q.inv, q.zp, q.lo, q.hi, out));
}

} // namespace

bool by_planes(const ConvImage &c, const PackHeader &h, const Output &out) {
    const Geometry &g = c.g;
    const int64_t pixels = g.height * g.width;
    if (!c.isa->product_planes || c.channels_last || !out.along_m || !c.pointwise() || h.groups != 1 ||
        h.taps != 1 || h.k == 0 || pixels == 0)
        return false;
    if (h.kind == PackKind::dense_i8) // whole vectors of pixels
        return (!c.isa->even_rows || h.k <= kFewForTiles) && 10 * round_up(pixels, 16) <= 11 * pixels;
    return h.kind == PackKind::sparse_i8 && !runs_by_strips(h) && h.blocks > 0 &&
           lists_pay(h, g.batch, pixels);
}

void planes_strip(const Isa &isa, const uint8_t *packed, const uint32_t *words, int64_t p0, int64_t p1,
                  const Output &out, int64_t b, int64_t at, int pixels, const float *scales, int32_t *sums) {
    const PackHeader &h = header_of(packed);
    const int64_t size = size_of(out.epilogue.out_dtype);
    for (int64_t p = p0; p < p1; ++p) {
        const int width = panel_width(h, p);
        const int cols = static_cast<int>(std::min<int64_t>(width, h.n - p * h.nr));
        char *to =
            static_cast<char *>(out.data) + (b * out.sample_stride + p * h.nr * out.plane_stride + at) * size;
        isa.product_planes({words, pixels, div_up(h.k, h.kr),
                            reinterpret_cast<const int8_t *>(panel_data(packed, 0, p)), width, cols, to,
                            out.plane_stride * size, static_cast<int>(size), sums});
        isa.epilogue(out.epilogue, sums, kPlanePixels, cols, pixels, true, p * h.nr, scales, to,
                     out.plane_stride);
    }
}

void planes_product(const ConvImage &c, const uint8_t *packed, const Output &out, int64_t b0, int64_t b1) {
    const PackHeader &h = header_of(packed);
    const bool dense = h.kind == PackKind::dense_i8;
    const int64_t pixels = c.oh * c.ow, strips = div_up(pixels, kPlanePixels), all = (b1 - b0) * strips;
    const int64_t per_pixel = dense ? h.n * (h.k + 32) : 4 * h.gs * h.entries + 32 * h.n;
    const int64_t threads = threads_for((b1 - b0) * pixels * per_pixel, h.total);
    // Threads take strips, or each prepares all of them for a part of the outputs: whichever takes fewer
    // cycles of the thread that has most, a quarter of a strip being a vector. Strips of two threads share a
    // cache line of every output where they meet.
    const int64_t vectors = div_up(pixels, 16), prepare = 4 * h.k,
                  product = dense ? h.k / 4 : h.gs * h.entries / h.n + 8, // an output
        most = dense ? std::min<int64_t>(h.n, h.nr * div_up(panels(h), threads)) : div_up(h.n, threads);
    const bool few = all < 4 * threads,
               by_output =
                   few && (b1 - b0) * vectors * (prepare + product * most) <
                              div_up((b1 - b0) * vectors, threads) * (prepare + product * h.n) + 60 * h.n;
    const auto strip = [&](int64_t i) {
        return std::min(pixels, few ? 16 * chunk_begin(vectors, strips, i) : kPlanePixels * i);
    };
    const int64_t tasks = by_output ? threads : std::min(threads, all);
    const int64_t lists = div_up(h.n, h.gs);
    parallel_tasks(tasks, [&](int64_t t) {
        // Where a part of the outputs begins: a panel or a sparse group.
        const auto output = [&](int64_t i) {
            const int64_t part = by_output ? i : i == t ? 0 : tasks;
            if (dense)
                return chunk_begin(panels(h), tasks, part);
            return group_at(reinterpret_cast<const uint32_t *>(packed + h.start_off), lists,
                            static_cast<double>(part) / static_cast<double>(tasks));
        };
        const int64_t p0 = output(t), p1 = output(t + 1);
        const int64_t s0 = by_output ? 0 : chunk_begin(all, tasks, t),
                      s1 = by_output ? all : chunk_begin(all, tasks, t + 1);
        uint8_t *image = static_cast<uint8_t *>(
            scratch(Scratch::image, static_cast<size_t>(round_up(h.k, 4) * kPlanePixels)));
        alignas(64) int32_t sums[kTileN * kPlanePixels];
        float scales[kPlanePixels] = {};
        for (int64_t i = s0; i < s1; ++i) {
            const int64_t at = strip(i % strips);
            const Strip s = {b0 + i / strips, at, static_cast<int>(strip(i % strips + 1) - at)};
            const SampleQuant q = c.quant(s.b);
            std::fill_n(scales, s.count, q.scale);
            if (q.blank)
                std::memset(image, q.zp + operand_shift(c.kind),
                            static_cast<size_t>(round_up(h.k, 4) * kPlanePixels));
            else if (dense)
                words_of(c, s, image);
            else
                panel_of(c, s, image);
            if (!dense) {
                lists_panel(*c.isa, packed, 0, image, kPlanePixels, p0, p1, out, b1 * pixels,
                            s.b * pixels + at, s.count, scales);
                continue;
            }
            planes_strip(*c.isa, packed, reinterpret_cast<const uint32_t *>(image), p0, p1, out, s.b, at,
                         s.count, scales, sums);
        }
    });
}

} // namespace tautorch
