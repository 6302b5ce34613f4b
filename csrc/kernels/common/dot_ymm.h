// Dense kernels of the two 256-bit instruction sets: panels of 16 outputs, tiles of 6 x 16. The including
// file defines `madd(acc, x, w)` and `load_w(p)` for 8 outputs and kKr inputs, and TT_PEAK_STEP: the same in
// assembly, on accumulator ymm\\r.
#pragma once

#include "kernels/common/isa.h"
#include "kernels/common/simd.h"

namespace tautorch {
namespace {
constexpr int kVectorsF32 = 2;
} // namespace
} // namespace tautorch
#include "kernels/common/dot_f32.h"

namespace tautorch {
namespace {

int32_t mr_of(int32_t) { return 6; }

// One int8 step: 32-bit groups of activations (4 u8 or 2 s16) against 8 outputs.
template <int MR, int NV>
void dot_i8_t(const void *const *rows, int64_t ld, int64_t taps, int64_t kq, const int8_t *b, int32_t *out) {
    __m256i acc[MR][NV];
    for (auto &row : acc)
        for (auto &v : row)
            v = _mm256_setzero_si256();
    for (int64_t t = 0; t < taps; ++t) {
        const char *a[MR];
        for (int r = 0; r < MR; ++r)
            a[r] = static_cast<const char *>(rows[t * ld + r]);
        for (int64_t q = 0; q < kq; ++q) {
            __m256i w[NV];
            for (int v = 0; v < NV; ++v)
                w[v] = load_w(b + 8 * kKr * v);
            b += 8 * kKr * NV;
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) {
                int32_t g;
                __builtin_memcpy(&g, a[r] + 4 * q, 4);
                const __m256i x = _mm256_set1_epi32(g);
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v)
                    acc[r][v] = madd(acc[r][v], x, w[v]);
            }
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v)
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + r * kTileN + 8 * v), acc[r][v]);
}

using DotI8 = void (*)(const void *const *, int64_t, int64_t, int64_t, const int8_t *, int32_t *);

// [vectors of the panel - 1][rows - 1]
constexpr DotI8 kDotI8[2][6] = {
    {dot_i8_t<1, 1>, dot_i8_t<2, 1>, dot_i8_t<3, 1>, dot_i8_t<4, 1>, dot_i8_t<5, 1>, dot_i8_t<6, 1>},
    {dot_i8_t<1, 2>, dot_i8_t<2, 2>, dot_i8_t<3, 2>, dot_i8_t<4, 2>, dot_i8_t<5, 2>, dot_i8_t<6, 2>},
};
void dot_i8(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
            int width, int32_t *acc) {
    kDotI8[width / 8 - 1][mr - 1](rows, ld, taps, kq, panel, acc);
}
// Everything starts at zero: what a register held before could be subnormal, which is slow.
#define TT_PEAK(step)                                                                                        \
    asm volatile(".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\tvpxor %%ymm\\r, %%ymm\\r, %%ymm\\r\n\t"    \
                 ".endr\n1:\n\t.irp r,0,1,2,3,4,5,6,7,8,9,10,11\n\t" step "\n\t.endr\n\tdec %0\n\tjnz 1b"    \
                 : "+r"(n)                                                                                   \
                 :                                                                                           \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",     \
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")
int64_t peak_i8(int64_t rounds) {
    int64_t n = rounds;
    TT_PEAK(TT_PEAK_STEP);
    return rounds * 12 * 8 * kKr;
}
int64_t peak_f32(int64_t rounds) {
    int64_t n = rounds;
    TT_PEAK("vfmadd231ps %%ymm14, %%ymm15, %%ymm\\r");
    return rounds * 12 * 8;
}

} // namespace
} // namespace tautorch
