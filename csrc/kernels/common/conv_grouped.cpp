#include "kernels/common/conv_grouped.h"

#include "core/parallel.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

constexpr int kLanes = 16, kMostQuads = 16; // a load of 64 bytes
constexpr int kSeenQuads = 2;               // of these by one output
constexpr int64_t kQuadBytes = 4 * kLanes;
constexpr int64_t kMostTaps = 64;

// Fills in all but the product's other fields. False if some output sees more than 2 quads: broadcasting each
// input is faster then (512 channels in groups of 16 on Zen 4: 520 us, the permutations 600 to 625).
bool group_weights(const int8_t *panel, int64_t taps, int64_t kq, GroupedI8 &g, int8_t *to) {
    const uint32_t *weights = reinterpret_cast<const uint32_t *>(panel);
    uint32_t seen[kLanes] = {};
    for (int64_t t = 0; t < taps; ++t)
        for (int64_t q = 0; q < kq; ++q)
            for (int lane = 0; lane < kLanes; ++lane) // over lanes, as vectors
                seen[lane] |= static_cast<uint32_t>(weights[(t * kq + q) * kLanes + lane] != 0) << q;
    int quads = 1;
    for (uint32_t mask : seen)
        quads = std::max(quads, __builtin_popcount(mask));
    if (quads > kSeenQuads)
        return false;
    g.quads = quads;
    g.wide = kq > 4;
    for (int lane = 0; lane < kLanes; ++lane)
        for (int q = 0; q < g.quads; ++q) {
            g.spread[q][lane] = seen[lane] ? __builtin_ctz(seen[lane]) : -1;
            seen[lane] &= seen[lane] - 1;
        }
    g.p.panel = to;
    uint32_t *out = reinterpret_cast<uint32_t *>(to);
    for (int64_t t = 0; t < taps; ++t)
        for (int q = 0; q < g.quads; ++q, out += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) {
                const int32_t from = g.spread[q][lane];
                out[lane] = from < 0 ? 0 : weights[(t * kq + from) * kLanes + lane];
            }
    return true;
}

} // namespace

bool GroupedWeights::prepare(const Isa &isa, const uint8_t *packed) {
    const PackHeader &h = header_of(packed);
    const int64_t kq = div_up(h.k, 4);
    if (!isa.grouped_i8 || h.kind != PackKind::dense_i8 || h.groups < 2 || h.n > kLanes || kq > kMostQuads ||
        h.taps > kMostTaps)
        return false;
    const int64_t bytes = h.taps * kSeenQuads * kQuadBytes;
    char *memory = static_cast<char *>(scratch(
        Scratch::inner, static_cast<size_t>(h.groups) * (sizeof(GroupedI8) + static_cast<size_t>(bytes))));
    isa_ = &isa;
    h_ = &h;
    groups_ = reinterpret_cast<GroupedI8 *>(memory);
    int8_t *weights = reinterpret_cast<int8_t *>(groups_ + h.groups);
    for (int64_t g = 0; g < h.groups; ++g) {
        groups_[g] = {};
        if (!group_weights(reinterpret_cast<const int8_t *>(panel_data(packed, g, 0)), h.taps, kq, groups_[g],
                           weights + g * bytes))
            return false;
    }
    return true;
}

// n pixels of one output row.
void GroupedWeights::row(const ConvBand &band, int64_t m, int n, int64_t group, const int64_t *taps,
                         GroupedI8 &to) const {
    const void *rows[kMostTaps];
    const char *first = band.pixel(m) + group * h_->k;
    for (int64_t t = 0; t < h_->taps; ++t)
        rows[t] = first + taps[t];
    to.p.rows = rows;
    to.p.ld = 1;
    to.p.row_step = band.c.dx * band.c.pixel;
    to.p.count = n;
    to.p.taps = h_->taps;
    isa_->grouped_i8(to);
}

void GroupedWeights::run(const ConvBand &band, int64_t m0, int rows, const int64_t *taps, const float *scale,
                         const Output &out) const {
    const int64_t width = band.c.ow;
    const auto each_row = [&](int from, int to, auto &&f) {
        for (int r = from; r < to;) {
            const int n = static_cast<int>(std::min<int64_t>(to - r, width - (m0 + r) % width));
            f(r, n);
            r += n;
        }
    };
    if (direct_output(out)) {
        const int64_t size = size_of(out.epilogue.out_dtype), row_bytes = out.row_stride * size;
        each_row(0, rows, [&](int r, int n) {
            for (int64_t g = 0; g < h_->groups; ++g) {
                GroupedI8 task = groups_[g];
                task.p.epilogue = &out.epilogue;
                task.p.n0 = g * h_->n;
                task.p.cols = static_cast<int>(h_->n);
                task.p.row_scale = scale + r;
                task.p.row_bytes = row_bytes;
                task.p.out = static_cast<char *>(out.data) + (m0 + r) * row_bytes + task.p.n0 * size;
                row(band, m0 + r, n, g, taps, task);
            }
        });
        return;
    }
    alignas(64) int32_t acc[kTileRows * kTileN];
    Epilogue plain;
    plain.out_dtype = DType::i32;
    for (int64_t g = 0; g < h_->groups; ++g)
        for (int t0 = 0; t0 < rows; t0 += kTileRows) {
            const int t1 = std::min(rows, t0 + kTileRows);
            each_row(t0, t1, [&](int r, int n) {
                GroupedI8 task = groups_[g];
                task.p.epilogue = &plain;
                task.p.cols = kLanes;
                task.p.row_bytes = kTileN * 4;
                task.p.out = reinterpret_cast<char *>(acc + (r - t0) * kTileN);
                row(band, m0 + r, n, g, taps, task);
            });
            store_tile(*isa_, out, acc, kTileN, false, m0 + t0, t1 - t0, g * h_->n, static_cast<int>(h_->n),
                       scale + t0);
        }
}

} // namespace tautorch
