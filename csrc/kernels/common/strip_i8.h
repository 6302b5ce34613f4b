// One strip of outputs of a sparse weight times a tile of rows, with the epilogue in registers.
#pragma once

#include "kernels/common/product_i8.h"

namespace tautorch {

constexpr int kCellInputs = 16; // of a step in a tile of rows
constexpr int kPairInputs = 32; // of a step in a strip of 2:4 weights
constexpr int kPairOutputs = 32;

struct StripI8 : ToOutput {
    const uint8_t *x; // u8_shifted [inputs / 16][rows][16]
    int rows;         // at most strip_rows(outputs)
    int outputs;      // of the strip: 16 or 32; 2:4: 32
    int64_t steps;
    // Which 16 inputs each step multiplies; null for 2:4, which takes 32 inputs after another.
    const uint16_t *cell;
    // Of a step: [quad of inputs][output][4]; 2:4: see pairs.h.
    const int8_t *data;
};
// A tile of 12 x 32 loads 14 vectors for 24 products, one of 16 x 16 17 for 16; both fit the registers.
inline int strip_rows(int outputs) { return outputs == 32 ? 12 : 16; }

void strip_i8_avx512vnni(const StripI8 &s);

} // namespace tautorch
