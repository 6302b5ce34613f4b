// int8_linear: y[M, N] = activation(x[M, K] W[N, K]^T * scales + bias).
//
// W is int8 with one float scale per output, packed by dense_pack (kind dense_i8; dense_w8 for weight-only;
// dense_f32 serves float factors). x is float rows (fp32, bf16, fp16; unit stride within a row) quantised
// here, or int8 with its scale. int32 accumulation, exact. K <= kMaxK for integer products.
#pragma once

#include "kernels/common/gemm.h"

namespace tautorch {

struct Int8LinearArgs {
    int64_t m = 0;
    const void *x = nullptr;
    int64_t x_stride = 0; // elements between rows
    ActQuant quant;       // mode none for dense_w8 and dense_f32
    const uint8_t *packed = nullptr;
    Output out; // epilogue.colsum and .correction are filled in here
};

void int8_linear(const Int8LinearArgs &args);

} // namespace tautorch
