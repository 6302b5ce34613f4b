// Dense kernels of the two 256-bit instruction sets: panels of 16 outputs, tiles of 6 x 16. The including
// file defines `madd(acc, x, w)` and `load_w(p)` for 8 outputs and kKr inputs, and TT_PEAK_STEP: the same in
// assembly, on accumulator ymm\\r.
#pragma once

#include "kernels/common/isa.h"
#include "kernels/common/simd.h"

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

template <int MR, int NV, bool I8>
void dot_f32_t(const void *const *rows, int64_t ld, int64_t taps, int64_t k, const void *panel, float *out) {
    __m256 acc[MR][NV];
    for (auto &row : acc)
        for (auto &v : row)
            v = _mm256_setzero_ps();
    const float *bf = static_cast<const float *>(panel);
    const int8_t *bi = static_cast<const int8_t *>(panel);
    for (int64_t t = 0; t < taps; ++t) {
        const float *a[MR];
        for (int r = 0; r < MR; ++r)
            a[r] = static_cast<const float *>(rows[t * ld + r]);
        for (int64_t i = 0; i < k; ++i) {
            __m256 w[NV];
            for (int v = 0; v < NV; ++v) {
                if constexpr (I8)
                    w[v] = _mm256_cvtepi32_ps(
                        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(bi + 8 * v))));
                else
                    w[v] = _mm256_loadu_ps(bf + 8 * v);
            }
            bf += 8 * NV;
            bi += 8 * NV;
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) {
                const __m256 x = _mm256_set1_ps(a[r][i]);
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v)
                    acc[r][v] = _mm256_fmadd_ps(x, w[v], acc[r][v]);
            }
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v)
            _mm256_storeu_ps(out + r * kTileN + 8 * v, acc[r][v]);
}

using DotI8 = void (*)(const void *const *, int64_t, int64_t, int64_t, const int8_t *, int32_t *);
using DotF32 = void (*)(const void *const *, int64_t, int64_t, int64_t, const void *, float *);

// [vectors of the panel - 1][rows - 1]
constexpr DotI8 kDotI8[2][6] = {
    {dot_i8_t<1, 1>, dot_i8_t<2, 1>, dot_i8_t<3, 1>, dot_i8_t<4, 1>, dot_i8_t<5, 1>, dot_i8_t<6, 1>},
    {dot_i8_t<1, 2>, dot_i8_t<2, 2>, dot_i8_t<3, 2>, dot_i8_t<4, 2>, dot_i8_t<5, 2>, dot_i8_t<6, 2>},
};
template <bool I8>
constexpr DotF32 kDotF32[2][6] = {
    {dot_f32_t<1, 1, I8>, dot_f32_t<2, 1, I8>, dot_f32_t<3, 1, I8>, dot_f32_t<4, 1, I8>, dot_f32_t<5, 1, I8>,
     dot_f32_t<6, 1, I8>},
    {dot_f32_t<1, 2, I8>, dot_f32_t<2, 2, I8>, dot_f32_t<3, 2, I8>, dot_f32_t<4, 2, I8>, dot_f32_t<5, 2, I8>,
     dot_f32_t<6, 2, I8>},
};

void dot_i8(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
            int width, int32_t *acc) {
    kDotI8[width / 8 - 1][mr - 1](rows, ld, taps, kq, panel, acc);
}
void dot_f32(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t k, const void *panel,
             bool weight_i8, int width, float *acc) {
    // Not (weight_i8 ? one : other)[i][j]: GCC 12 indexes that wrongly in sanitizer builds.
    const DotF32 dot =
        weight_i8 ? kDotF32<true>[width / 8 - 1][mr - 1] : kDotF32<false>[width / 8 - 1][mr - 1];
    dot(rows, ld, taps, k, panel, acc);
}

int64_t peak_i8(int64_t rounds) {
    int64_t n = rounds;
    asm volatile("1:\n\t.irp r,0,1,2,3,4,5,6,7,8,9,10,11\n\t" TT_PEAK_STEP "\n\t.endr\n\tdec %0\n\tjnz 1b"
                 : "+r"(n)
                 :
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                   "xmm10", "xmm11", "xmm13");
    return rounds * 12 * 8 * kKr;
}

} // namespace
} // namespace tautorch
