// One panel of dense int8 weights times a block of rows, with the epilogue in registers.
#pragma once

#include "kernels/common/types.h"

namespace tautorch {

struct ProductI8 {
    const void *const *rows; // [taps][ld] operands, u8_shifted
    int64_t ld;
    int64_t row_step; // bytes from each row to the next if that is all rows[1 ...] say, else 0
    int count;        // rows
    int64_t taps, kq; // groups of 4 inputs per tap
    const int8_t *panel;
    int width;          // a multiple of 16, at most 64
    const int8_t *next; // the panel after this one, or this one again: fetched into L2 meanwhile
    // Activation none or relu. Out has row_bytes from one row to the next and gets `cols` outputs, whose
    // scale, bias and column sums are at n0.
    const Epilogue *epilogue;
    int64_t n0;
    int cols;
    const float *row_scale; // [count]
    char *out;
    int64_t row_bytes;

    // More than 1: whole panels of 64 outputs that follow each other, for even rows and float output.
    int64_t panels;

    bool even() const { return taps == 1 && (row_step != 0 || count == 1); }
};

void product_i8_avx512vnni(const ProductI8 &p);
void product_i8_rows_avx512vnni(const ProductI8 &p);

} // namespace tautorch
