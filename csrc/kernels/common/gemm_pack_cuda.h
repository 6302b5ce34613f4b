// Weights as the kernels of gemm_sm80.cuh read them: units of 64 outputs by 64 elements of K.
//
// With g = lane / 4 and t = lane % 4, a lane's 16 bytes are registers 0 to 3 of the A operand of mma, 4 bytes
// each:
//   dense   [4 tiles of 16 outputs][2 halves of K][lane]: output 16 o + g + 8 (i % 2), K 32 h + 16 (i / 2) +
//   4 t 2:4     [4 tiles of 16 outputs][lane]: the same of the kept values, 32 of 64; then [lane][4 tiles] of
//   places,
//           16 of 2 bits: of output 16 o + g + 8 (t % 2), kept values from 16 (t / 2) on
//   2:4 of 16-bit elements: 64 outputs by 32 of K, so that the tiles are the same bytes; then [lane][2] of
//   places:
//           in word p of output 16 (2 p + t / 2) + g (lower half) and + 8 (upper), kept values from 8 (t % 2)
//           on
// Outputs and elements that do not exist are 0, at places 0 and 1.
#pragma once

#include "kernels/common/cuda_status.h"

namespace tautorch::cuda {

constexpr int kGemmStep = 64;                                                 // bytes of a row
constexpr int kDenseUnit = 4096, kSparseUnit = 2560, kSparseFloatUnit = 2304; // bytes

// units | sums int32 [n], on a line of 128 bytes.
struct GemmLayout {
    int64_t groups, steps, sums_off, total;
};
// k in bytes.
inline GemmLayout gemm_layout(int64_t n, int64_t k, int64_t unit) {
    GemmLayout h{};
    h.groups = div_up(n, 64);
    h.steps = div_up(k, kGemmStep);
    h.sums_off = round_up(h.groups * h.steps * unit, 128);
    h.total = h.sums_off + round_up(4 * n, 128);
    return h;
}

// weight int8 [n, ld], of which k elements a row count -> units on 16 bytes. Asynchronous.
int gemm_pack_dense(const int8_t *weight, int64_t ld, int64_t n, int64_t k, uint8_t *units, void *stream);
// values int8 [n, kept], places uint8 [n, kept / 4] (4 of 2 bits, the first lowest, each pair ascending),
// both whole rows; kept a multiple of 4, half of K.
int gemm_pack_sparse(const int8_t *values, const uint8_t *places, int64_t n, int64_t kept, uint8_t *units,
                     void *stream);
// The same of bf16 or fp16.
int gemm_pack_sparse_float(const uint16_t *values, const uint8_t *places, int64_t n, int64_t kept,
                           uint8_t *units, void *stream);

} // namespace tautorch::cuda
