// One panel of dense int8 weights times a block of rows, with the epilogue in registers.
#pragma once

#include "kernels/common/types.h"

namespace tautorch {

// Where a tile of int32 sums goes. Activation none or relu. Out has row_bytes from one row to the next and
// gets `cols` outputs, whose scale, bias and column sums are at n0.
struct ToOutput {
    const Epilogue *epilogue;
    int64_t n0;
    int cols;
    const float *row_scale; // of each row
    char *out;
    int64_t row_bytes;
    const int32_t *out_row; // where in out each row goes; null: one after another
};

struct ProductI8 : ToOutput {
    const void *const *rows; // [taps][ld] operands, u8_shifted
    int64_t ld;
    int64_t row_step; // bytes from each row to the next if that is all rows[1 ...] say, else 0
    int count;        // rows
    int64_t taps, kq; // groups of 4 inputs per tap
    const int8_t *panel;
    int64_t gap;        // bytes of the panel that are left out after each tap
    int width;          // a multiple of 16, at most 64
    const int8_t *next; // the panel after this one, or what else is fetched meanwhile
    int64_t next_bytes; // of it, where rows are not even; where they are, about as many as they have
    // Even rows that have yet to be made, of 4 * kq bytes: the int8 ones at raw, one after another, with
    // their top bits turned, go to operands, which is rows[0]. Null: rows are there.
    const char *raw;
    char *operands;

    // More than 1: whole panels of 64 outputs that follow each other, for even rows and float output.
    int64_t panels;

    bool even() const { return taps == 1 && (row_step != 0 || count == 1); }
};

void product_i8_avx512vnni(const ProductI8 &p);
// Fewer rows are faster by vectors: a tile takes as long with one row as with 16.
constexpr int kLeastTileRows = 5;
void product_i8_amx(const ProductI8 &p);
int64_t peak_i8_amx(int64_t rounds); // see Isa::peak_i8
void even_rows_amx(const void *const *rows, int64_t ld, int count, int64_t taps, int64_t bytes, char *out,
                   int64_t step);
// int8 output of the first rows, and how many these are: 0 where this is not the kernel for them. More than
// 0: all rows have been made of raw.
int product_i8_codes_avx512vnni(const ProductI8 &p);
void product_i8_rows_avx512vnni(const ProductI8 &p);

// Up to 64 outputs of a grouped_i8 pack (see grouped.h) for runs of pixels, each in one row of the image.
struct GroupedRun {
    const char *first; // under tap 0 of the first pixel
    int row, count;    // of the output, from row on
};
struct GroupedI8 {
    ToOutput to;
    const GroupedRun *runs;
    int run_count;
    int64_t step;        // bytes from pixel to pixel
    int64_t shift;       // bytes from a pixel's first channel to the first of these
    const int64_t *taps; // distances from the first
    int64_t count;       // of taps
    int quads;           // of a group: 1, 2 or 4
    const int8_t *weights;
};
void grouped_i8_avx512vnni(const GroupedI8 &g);

} // namespace tautorch
