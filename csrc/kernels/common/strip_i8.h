// One strip of outputs of a sparse weight times a tile of rows, with the epilogue in registers (on Arm: int32
// sums of cells alone).
#pragma once

#include "kernels/common/product_i8.h"

namespace tautorch {

constexpr int kCellInputs = 16; // of a step in a tile of rows
constexpr int kPairInputs = 32; // of a step in a strip of 2:4 weights
constexpr int kPairOutputs = 32;

struct StripI8 : ToOutput {
    const uint8_t *x; // operands [inputs / unit][rows][unit], unit = StripKernel::unit
    int rows;         // at most StripKernel::rows(outputs)
    int outputs;      // of the strip: 16 or 32; 2:4: 32
    int64_t steps;
    // Which 16 inputs each step multiplies; null for 2:4, which takes 32 inputs after another.
    const uint16_t *cell;
    // Of a step: [group of kr inputs][output][kr]; 2:4: see pairs.h.
    const int8_t *data;
};

struct StripKernel {
    int unit;       // inputs of a row side by side
    bool pairs;     // runs 2:4 too
    bool to_output; // with the epilogue; otherwise out is [rows][outputs] int32 sums
    // At most, for a strip of so many outputs; 0: no such strips. A tile of 12 x 32 loads 14 vectors for 24
    // products, one of 16 x 16 17 for 16; both fit AVX-512's registers.
    int rows16, rows32;
    void (*run)(const StripI8 &);
    int rows(int64_t outputs) const { return outputs == 32 ? rows32 : outputs == 16 ? rows16 : 0; }
};
extern const StripKernel strip_avx512vnni;

} // namespace tautorch
