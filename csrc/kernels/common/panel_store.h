// From input-major accumulators, a tile of outputs by panel rows, to the output.
#pragma once

#include "kernels/common/gemm.h"

#include <algorithm>
#include <cstring>

namespace tautorch {

// Input-major tiles [kTileOutputs][w] of accumulators on their way to row-major output: 16 rows by up to
// kTileOutputs outputs at a time. Stores of fewer than 128 outputs to rows that lie a multiple of 4 KB apart
// cost 0.6 cycles an output, of 128 and more 0.16.
struct PanelStore {
    const Isa &isa;
    const Output &out;
    const void *acc;
    int w;
    bool turned;                                     // acc is as sparse_i8_scaled turns it
    const uint32_t *line[kTileN / 16][kTileOutputs]; // [rows / 16][output]

    PanelStore(const Isa &isa, const Output &out, const void *acc, int w, bool turned = false)
        : isa(isa), out(out), acc(acc), w(w), turned(turned) {
        for (int b = 0; !turned && b < w / 16; ++b)
            for (int i = 0; i < kTileOutputs; ++i)
                line[b][i] = static_cast<const uint32_t *>(acc) + i * w + 16 * b;
    }
    void operator()(int64_t m0, int rows, int64_t n0, int cols, const float *scale) const {
        if (out.along_m)
            return store_tile(isa, out, acc, w, true, m0, rows, n0, cols, scale);
        const Epilogue &e = out.epilogue;
        const int64_t size = size_of(e.out_dtype);
        // Floats that are done: no scales, nothing to add or activate.
        const bool done =
            e.acc_float && e.activation == Activation::none && !e.w_scale && !e.bias && !e.addend && !scale;
        alignas(64) uint32_t part[16 * kTileOutputs];
        for (int b = 0; 16 * b < rows; ++b) {
            const int64_t m = m0 + 16 * b;
            const int lines = std::min(16, rows - 16 * b);
            char *to = static_cast<char *>(out.data) + (m * out.row_stride + n0) * size;
            const float *sums = static_cast<const float *>(acc);
            if (turned && done && e.out_dtype != DType::i8) {
                isa.sparse_rows(sums, b, lines, cols, e.out_dtype, to, out.row_stride * size);
                continue;
            }
            if (turned)
                isa.sparse_rows(sums, b, lines, cols, DType::f32, reinterpret_cast<char *>(part),
                                4 * kTileOutputs);
            else
                isa.transpose_32(line[b], static_cast<int>(round_up(cols, 16)), 16, part, kTileOutputs);
            if (done && e.out_dtype == DType::f32)
                for (int r = 0; r < lines; ++r)
                    std::memcpy(to + 4 * r * out.row_stride, part + r * kTileOutputs,
                                static_cast<size_t>(4 * cols));
            else
                isa.epilogue(e, part, kTileOutputs, lines, cols, false, n0, scale ? scale + 16 * b : nullptr,
                             to, out.row_stride);
        }
    }
};

} // namespace tautorch
