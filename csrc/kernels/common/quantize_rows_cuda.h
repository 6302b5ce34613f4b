// Row quantiser on CUDA: float rows -> int8 rows and one fp32 scale per row. Exact: equal to every other
// backend.
//
//   dynamic (x_scale null):  amax = max |x| of the row. amax < 2^-100: scale 1, q 0.
//                            scale = amax / 127, inv = 127 / amax, q = clamp(rint(x * inv), -127, 127)
//   static:                  inv = 1 / x_scale, q = clamp(rint(x * inv) + zero_point, -128, 127), scale =
//   x_scale NaN or Inf in the row:   scale NaN, q 0 (static: zero_point)
#pragma once

#include "kernels/common/cuda_status.h"

namespace tautorch::cuda {

struct QuantizeRows {
    const void *x; // device, [m, k] of dtype, strides in elements; any alignment
    DType dtype;   // float32, bfloat16 or float16
    int64_t stride_m;
    int64_t stride_k;
    int64_t m;                 // 0 <= m < 2^31
    int64_t k;                 // 0 <= k < 2^31
    const float *x_scale;      // device, 1 value, or null for dynamic
    const int32_t *zero_point; // device, 1 value, or null for 0; static only
    int8_t *q;                 // device, [m, ldq], 16-byte aligned; columns k..ldq are left as they were
    int64_t ldq;               // multiple of 16, at least k
    float *scale;              // device, [m]
    uint32_t *peaks = nullptr; // device, [m] to be overwritten, or null: each row by one block
};

// Whether quantize_rows() lets several blocks share a row, and how.
bool quantize_in_parts(const QuantizeRows &a);
int quantize_rows_in_parts(const QuantizeRows &a, void *stream);

// What comes before rounding, in fp32 and in registers: nothing of it goes through memory.
enum class RowStage : int {
    none,
    rms_norm,   // x / sqrt(mean x^2 + eps) * weight
    layer_norm, // (x - mean) / sqrt(variance + eps) * weight + bias
    silu_gate,  // silu(gate) * x
    gelu,       // by erf
    gelu_tanh,
};

struct QuantizeRowsAfter {
    QuantizeRows
        rows; // stride_k 1; x and its rows on 16 bytes; k a multiple of 16 bytes of x, at most kMaxHeld
    RowStage stage;
    const float *weight; // [k] on 16 bytes, or null for 1
    const float *bias;   // [k] on 16 bytes, or null for 0
    const void *gate;    // rows as x's, gate_stride_m elements apart; silu_gate only
    int64_t gate_stride_m;
    float eps;
};
// 64 values in each of 256 threads.
constexpr int64_t kMaxHeld = 16384;

// The same as quantize_rows() of what the stage makes of x.
int quantize_rows_after(const QuantizeRowsAfter &a, void *stream);

// Asynchronous on `stream` (a cudaStream_t) of the current device.
int quantize_rows(const QuantizeRows &a, void *stream);

} // namespace tautorch::cuda
