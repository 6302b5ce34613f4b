// From input-major accumulators, a tile of outputs by panel rows, to the output.
#pragma once

#include "kernels/common/gemm.h"

#include <algorithm>

namespace tautorch {

constexpr int kTileOutputs = 128; // of an input-major tile

// Input-major tiles [kTileOutputs][w] of accumulators on their way to row-major output: 16 rows by up to
// kTileOutputs outputs at a time. Stores of fewer than 128 outputs to rows that lie a multiple of 4 KB apart
// cost 0.6 cycles an output, of 128 and more 0.16.
struct PanelStore {
    const Isa &isa;
    const Output &out;
    const void *acc;
    int w;
    const uint32_t *line[kTileN / 16][kTileOutputs]; // [rows / 16][output]

    PanelStore(const Isa &isa, const Output &out, const void *acc, int w)
        : isa(isa), out(out), acc(acc), w(w) {
        for (int b = 0; b < w / 16; ++b)
            for (int i = 0; i < kTileOutputs; ++i)
                line[b][i] = static_cast<const uint32_t *>(acc) + i * w + 16 * b;
    }
    void operator()(int64_t m0, int rows, int64_t n0, int cols, const float *scale) const {
        if (out.along_m)
            return store_tile(isa, out, acc, w, true, m0, rows, n0, cols, scale);
        alignas(64) uint32_t turned[16 * kTileOutputs];
        for (int b = 0; 16 * b < rows; ++b) {
            isa.transpose_32(line[b], static_cast<int>(round_up(cols, 16)), 16, turned, kTileOutputs);
            const int64_t m = m0 + 16 * b;
            isa.epilogue(out.epilogue, turned, kTileOutputs, std::min(16, rows - 16 * b), cols, false, n0,
                         scale ? scale + 16 * b : nullptr,
                         static_cast<char *>(out.data) +
                             (m * out.row_stride + n0) * size_of(out.epilogue.out_dtype),
                         out.row_stride);
        }
    }
};

} // namespace tautorch
