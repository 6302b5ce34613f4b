// Sparse int8 primitives for AVX-512; see isa.h for their contracts.
#pragma once

#include "kernels/common/isa.h"

namespace tautorch {

struct SparseOrder {
    uint8_t at[64];
};
// Byte unpacking works within 128-bit lanes: interleaving four panel rows of 64 gives accumulator j the
// bytes 16 l + 4 j + i at element 4 l + i. Storing row 16 j + 4 l + i there makes the result come in order.
constexpr SparseOrder sparse_order_avx512() {
    SparseOrder o = {};
    for (int r = 0; r < 64; ++r)
        o.at[r] = static_cast<uint8_t>(16 * (r / 4 % 4) + 4 * (r / 16) + r % 4);
    return o;
}
constexpr SparseOrder kSparseOrderAvx512 = sparse_order_avx512();

void sparse_i8_avx512vnni(int gs, int w, const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                          const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc);

void sparse_i8_scaled_avx512vnni(const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                                 const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc,
                                 const SparseScales &scales);

void sparse_rows_avx512vnni(const float *turned, int block, int rows, int cols, DType dtype, char *to,
                            int64_t step);

bool sparse_i8_codes_avx512vnni(const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                                const int8_t *values, int64_t g0, int64_t g1, const int32_t *sums,
                                const SparseScales &scales, const SparseCodes &to);

} // namespace tautorch
