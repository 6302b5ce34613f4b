#include "kernels/common/conv_grouped.h"

#include "kernels/common/grouped.h"

#include <algorithm>

namespace tautorch {

void grouped_product(const Isa &isa, const uint8_t *packed, const ConvBand &band, int64_t m0, int rows,
                     const int64_t *taps, const float *scale, const Output &out) {
    const PackHeader &h = header_of(packed);
    const int64_t width = band.c.ow, channels = h.groups * h.n, size = size_of(out.epilogue.out_dtype);
    GroupedI8 task = {};
    task.taps = taps;
    task.count = h.taps;
    task.quads = static_cast<int>(h.n / 4);
    task.step = band.c.dx * band.c.pixel;
    // Runs of pixels of one output row.
    GroupedRun runs[kBlockPixels];
    const auto find_runs = [&](int from, int to) {
        task.runs = runs;
        task.run_count = 0;
        for (int r = from; r < to;) {
            const int n = static_cast<int>(std::min<int64_t>(to - r, width - (m0 + r) % width));
            runs[task.run_count++] = {band.pixel(m0 + r), r - from, n};
            r += n;
        }
    };
    const auto multiply = [&](int64_t n0, int64_t cols) {
        task.weights =
            reinterpret_cast<const int8_t *>(packed + h.data_off) + n0 / kGroupedBlock * grouped_bytes(h);
        task.shift = n0;
        task.to.cols = static_cast<int>(cols);
        isa.grouped_i8(task);
    };
    // A line of the image at a time.
    if (direct_output(out)) {
        find_runs(0, rows);
        task.to.epilogue = &out.epilogue;
        task.to.row_scale = scale;
        task.to.row_bytes = out.row_stride * size;
        for (int64_t n0 = 0; n0 < channels; n0 += kTileN) {
            task.to.n0 = n0;
            task.to.out = static_cast<char *>(out.data) + (m0 * out.row_stride + n0) * size;
            multiply(n0, std::min<int64_t>(kTileN, channels - n0));
        }
        return;
    }
    alignas(64) int32_t acc[kTileRows * kTileN];
    Epilogue plain;
    plain.out_dtype = DType::i32;
    task.to.epilogue = &plain;
    task.to.row_bytes = kTileN * 4;
    task.to.out = reinterpret_cast<char *>(acc);
    for (int t0 = 0; t0 < rows; t0 += kTileRows) {
        const int tile = std::min(kTileRows, rows - t0);
        find_runs(t0, t0 + tile);
        for (int64_t n0 = 0; n0 < channels; n0 += kTileN) {
            const int64_t cols = std::min<int64_t>(kTileN, channels - n0);
            multiply(n0, cols);
            store_tile(isa, out, acc, kTileN, false, m0 + t0, tile, n0, static_cast<int>(cols), scale + t0);
        }
    }
}

} // namespace tautorch
