// int8_linear: y[M, N] = activation(x[M, K] W[N, K]^T * scales + bias).
//
// W is int8 with one float scale per output, packed by dense_pack (kind dense_i8; dense_w8 for weight-only;
// dense_f32 serves float factors). x is float rows (fp32, bf16, fp16; unit stride within a row) quantised
// here, or int8 with its scale. int32 accumulation, exact. K <= kMaxK for integer products.
#pragma once

#include "kernels/common/product.h"

namespace tautorch {

void int8_linear(const LinearArgs &args);

} // namespace tautorch
