// Sparse primitives through generic vectors, for instruction sets without kernels of their own.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

// Rows of x keep their place in a panel.
constexpr uint8_t kPlainOrder[64] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
    22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
    44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63,
};

[[maybe_unused]] void sparse_i8_plain(int gs, int w, const uint8_t *x, const uint32_t *start,
                                      const uint16_t *idx, const int8_t *values, int64_t g0, int64_t g1,
                                      bool add, int32_t *acc) {
    for (int64_t g = g0; g < g1; ++g, acc += gs * w) {
        if (!add)
            std::memset(acc, 0, sizeof(int32_t) * static_cast<size_t>(gs * w));
        for (int64_t q = start[g]; q < start[g + 1]; ++q)
            for (int r = 0; r < gs; ++r)
                for (int j = 0; j < 4; ++j) {
                    const int32_t v = values[(q * gs + r) * 4 + j];
                    const uint8_t *xk = x + idx[4 * q + j] * w / 8;
                    for (int i = 0; i < w; ++i)
                        acc[r * w + i] += v * xk[i];
                }
    }
}

} // namespace
} // namespace tautorch
