#include "kernels/common/depthwise_planes.h"

#include "core/parallel.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

// Zero points between the rows of a padded plane; rows are written by as many bytes at a time.
constexpr int64_t kMargin = 16;
constexpr int64_t kMostPlane = 128 * 1024; // pixels, so that codes and padded plane stay in L2
constexpr int64_t kMostWeights = 64;       // words
// Narrower planes are turned in less time than their rows are padded (Zen 4).
constexpr int64_t kLeastWidth = 14;
constexpr int64_t kSums = 1024;
constexpr int64_t kTogether = 16; // planes

// A plane's pixels to the rows of a padded one. Bytes after them, in both, are read and written.
void pad_rows(const uint8_t *from, int64_t height, int64_t width, uint8_t margin, uint8_t *to) {
    uint8_t outside[kMargin];
    std::memset(outside, margin, sizeof outside);
    for (int64_t y = 0; y < height; ++y, from += width, to += width + kMargin) {
        for (int64_t i = 0; i < width; i += kMargin)
            std::memcpy(to + i, from + i, kMargin);
        std::memcpy(to + width, outside, kMargin);
    }
}

// Weights of taps [t, t + n), n <= 4, of one channel.
int32_t word_of(const uint8_t *packed, int64_t channel, int64_t t, int64_t n) {
    const PackHeader &h = header_of(packed);
    const uint8_t *at = packed + h.data_off + depthwise_at(h, channel, t / 4 * 4);
    uint32_t low, high = 0;
    std::memcpy(&low, at, 4);
    if (t % 4 + n > 4)
        std::memcpy(&high, at + 4 * kTileN, 4);
    const uint64_t both = (uint64_t{high} << 32 | low) >> (8 * (t % 4));
    return static_cast<int32_t>(both & ((uint64_t{1} << (8 * n)) - 1));
}

} // namespace

bool depthwise_in_planes(const ConvImage &c, const PackHeader &h, const Output &out) {
    const Geometry &g = c.g;
    return c.isa->depthwise_planes && h.kind == PackKind::depthwise_i8 && !c.channels_last && out.along_m &&
           c.ow >= kLeastWidth && g.sw + g.dw <= kPlaneSteps && g.pw <= kMargin && c.ow <= kSums &&
           g.kh * div_up(g.kw, 4) <= kMostWeights &&
           (g.height + 2 * g.ph) * (g.width + kMargin) <= kMostPlane;
}

void depthwise_by_planes(const ConvImage &c, const uint8_t *packed, const Output &out, int64_t b0,
                         int64_t b1) {
    const PackHeader &h = header_of(packed);
    const Geometry &g = c.g;
    const int64_t plane = g.height * g.width, outputs = c.oh * c.ow, row = g.width + kMargin,
                  size = size_of(out.epilogue.out_dtype), quads = div_up(g.kw, 4);
    const int64_t padded = (g.height + 2 * g.ph) * row + kMargin;
    // Small planes leave together, large ones in blocks of rows.
    const int64_t together = std::clamp<int64_t>(kSums / outputs, 1, kTogether),
                  block = std::min(c.oh, kSums / c.ow), groups = div_up(g.channels, together),
                  all = (b1 - b0) * groups;
    const int64_t threads = threads_for((b1 - b0) * g.channels * outputs * (8 * h.taps + 32), h.total),
                  tasks = std::min(threads, all);
    parallel_tasks(tasks, [&](int64_t t) {
        uint8_t *codes =
            static_cast<uint8_t *>(scratch(Scratch::rows, static_cast<size_t>(together * plane + kMargin)));
        const size_t bytes = static_cast<size_t>(together * padded + 64);
        uint8_t *image = static_cast<uint8_t *>(scratch(Scratch::image, bytes));
        std::memset(image, c.pad, bytes);
        alignas(64) int32_t sums[kSums + 16];
        float scales[kSums];
        int32_t weights[kTogether * kMostWeights];
        DepthwisePlanes task = {};
        task.g = &g;
        task.ow = c.ow;
        task.row = row;
        task.x_step = padded;
        task.weights = weights;
        task.weights_step = g.kh * quads;
        task.sums = sums;
        task.sums_step = outputs;
        const int64_t begin = chunk_begin(all, tasks, t), end = chunk_begin(all, tasks, t + 1);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = b0 + i / groups, first = i % groups * together,
                          count = std::min(together, g.channels - first);
            const SampleQuant q = c.quant(b);
            if (i == begin || first == 0)
                std::fill_n(scales, std::min(outputs, kSums), q.scale);
            if (q.blank)
                std::memset(codes, q.zp + operand_shift(c.kind), static_cast<size_t>(count * plane));
            else
                c.met(b, c.isa->quantize(c.x + (b * g.channels + first) * plane * size_of(c.dtype), c.dtype,
                                         count * plane, q.inv, q.zp, q.lo, q.hi, c.isa->act, codes));
            // All before the first is multiplied, which reads bytes in vectors just after they were written.
            int32_t *word = weights;
            for (int64_t j = 0; j < count; ++j) {
                for (int64_t ky = 0; ky < g.kh; ++ky)
                    for (int64_t kx = 0; kx < g.kw; kx += 4)
                        *word++ = word_of(packed, first + j, ky * g.kw + kx, std::min<int64_t>(4, g.kw - kx));
                pad_rows(codes + j * plane, g.height, g.width, static_cast<uint8_t>(c.pad),
                         image + j * padded + kMargin + g.ph * row);
            }
            task.planes = count;
            for (int64_t y = 0; y < c.oh; y += block) {
                task.x = image + kMargin - g.pw + y * g.sh * row;
                task.rows = std::min(block, c.oh - y);
                c.isa->depthwise_planes(task);
                char *to = static_cast<char *>(out.data) +
                           (b * out.sample_stride + first * out.plane_stride + y * c.ow) * size;
                c.isa->epilogue(out.epilogue, sums, outputs, static_cast<int>(count),
                                static_cast<int>(task.rows * c.ow), true, first, scales, to,
                                out.plane_stride);
            }
        }
    });
}

} // namespace tautorch
