// Products of prepared rows by packed weights, spread over threads: what the operators call.
#pragma once

#include "kernels/common/source.h"

namespace tautorch {

// Dense kinds.
void dense_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out);
// sparse_i8; for sparse_f32 see sparse_f32.h. Operands are bytes.
void sparse_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out);
// Either, by the pack's kind.
void product(const uint8_t *packed, const Source &x, const Output &out);

// Outputs of sparse groups [s0, s1) of one convolution group of lists, for `rows` rows from m0 on of m in
// all, times an input-major panel of w.
void lists_panel(const Isa &isa, const uint8_t *packed, int64_t group, const void *panel, int w, int64_t s0,
                 int64_t s1, const Output &out, int64_t m, int64_t m0, int rows, const float *scale);
// First sparse group whose entries start at or after this part of the group's.
int64_t group_at(const uint32_t *start, int64_t groups, double part);

// What a linear operator takes: rows of x (unit stride within a row) and packed weights.
// out.epilogue.colsum, .correction and .acc_float are filled in by the operator.
struct LinearArgs {
    int64_t m = 0;
    const void *x = nullptr;
    int64_t x_stride = 0; // elements between rows
    ActQuant quant;       // mode none where x stays float
    const uint8_t *packed = nullptr;
    Output out;
};
Source source_of(const LinearArgs &a);
// Of all rows, with an output whose epilogue is complete.
void product(const LinearArgs &a, const Output &out);

// What a convolution takes: an image, NCHW or channels last, and packed weights. The output's layout is
// chosen on its own.
struct ConvArgs {
    Geometry geometry;
    const void *x = nullptr;
    bool channels_last = false;
    ActQuant quant;
    const uint8_t *packed = nullptr;
    Epilogue epilogue;
    int64_t outputs = 0;
    void *out = nullptr;
    bool out_channels_last = false;
};
ImagePixels pixels_of(const ConvArgs &a);
Source source_of(const ConvArgs &a); // all of them

// A low-rank operator: x -> down -> up. Between them the intermediate is one tile of rows, scaled by
// down_scale, and requantised per row (and convolution group) where the factors are int8. A residual adds
// x -> residual before the bias; it is of one group and as wide as up.
struct LowRank {
    const uint8_t *down = nullptr, *up = nullptr, *residual = nullptr; // packed; residual may be null
    const float *down_scale = nullptr, *residual_scale = nullptr;      // null for float weights
    ActQuant quant;                                                    // of x for down
    Output out;                                                        // epilogue.w_scale: up's

    ActQuant residual_quant() const; // of x for the residual
    bool sparse_residual() const;
};
// x as prepared rows (no residual), or as rows of a matrix.
void lowrank_product(const LowRank &a, const Source &x);
void lowrank_product(const LowRank &a, const void *x, int64_t stride, int64_t m);

// Operands of these weights.
OperandKind operand_of(const uint8_t *packed);

} // namespace tautorch
