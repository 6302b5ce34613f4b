// Sparse int8 for the two 256-bit instruction sets, 16 rows of a panel at a time; see isa.h for the contract.
// The including file defines TT_DOT_BYTES as 1 where vpdpbusd takes bytes; otherwise pairs of 16 bits go
// through vpmaddwd.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

inline __m128i row16(const uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); }

#if TT_DOT_BYTES
// Rows 0-3 and 8-11 in the first register, 4-7 and 12-15 in the second, four inputs of each side by side.
struct Quad {
    __m256i lo, hi;
};
inline Quad quad_of(const uint8_t *x, const uint16_t *i, int w) {
    const __m128i a = row16(x + i[0] * w / 8), b = row16(x + i[1] * w / 8);
    const __m128i c = row16(x + i[2] * w / 8), d = row16(x + i[3] * w / 8);
    const __m256i ab = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
    const __m256i cd = _mm256_set_m128i(_mm_unpackhi_epi8(c, d), _mm_unpacklo_epi8(c, d));
    return {_mm256_unpacklo_epi16(ab, cd), _mm256_unpackhi_epi16(ab, cd)};
}
template <int GS> inline void add_quad(const Quad &q, const int8_t *values, __m256i (&c)[GS][2]) {
#pragma GCC unroll 4
    for (int r = 0; r < GS; ++r) {
        int32_t v;
        __builtin_memcpy(&v, values + 4 * r, 4);
        const __m256i w = _mm256_set1_epi32(v);
        c[r][0] = _mm256_dpbusd_avx_epi32(c[r][0], q.lo, w);
        c[r][1] = _mm256_dpbusd_avx_epi32(c[r][1], q.hi, w);
    }
}
#else
struct Quad {
    __m256i lo[2], hi[2]; // [pair of inputs]
};
inline Quad quad_of(const uint8_t *x, const uint16_t *i, int w) {
    const __m256i a = _mm256_cvtepu8_epi16(row16(x + i[0] * w / 8));
    const __m256i b = _mm256_cvtepu8_epi16(row16(x + i[1] * w / 8));
    const __m256i c = _mm256_cvtepu8_epi16(row16(x + i[2] * w / 8));
    const __m256i d = _mm256_cvtepu8_epi16(row16(x + i[3] * w / 8));
    return {{_mm256_unpacklo_epi16(a, b), _mm256_unpacklo_epi16(c, d)},
            {_mm256_unpackhi_epi16(a, b), _mm256_unpackhi_epi16(c, d)}};
}
template <int GS> inline void add_quad(const Quad &q, const int8_t *values, __m256i (&c)[GS][2]) {
#pragma GCC unroll 4
    for (int r = 0; r < GS; ++r) {
        int32_t v;
        __builtin_memcpy(&v, values + 4 * r, 4);
        const __m256i both = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(v)));
        const __m256i w0 = _mm256_shuffle_epi32(both, 0x00), w1 = _mm256_shuffle_epi32(both, 0x55);
        c[r][0] = _mm256_add_epi32(
            c[r][0], _mm256_add_epi32(_mm256_madd_epi16(q.lo[0], w0), _mm256_madd_epi16(q.lo[1], w1)));
        c[r][1] = _mm256_add_epi32(
            c[r][1], _mm256_add_epi32(_mm256_madd_epi16(q.hi[0], w0), _mm256_madd_epi16(q.hi[1], w1)));
    }
}
#endif

template <int GS, int W>
void sparse_i8_t(const uint8_t *x, const uint32_t *start, const uint16_t *idx, const int8_t *values,
                 int64_t g0, int64_t g1, bool add, int32_t *acc) {
    for (int64_t g = g0; g < g1; ++g, acc += GS * W)
        for (int first = 0; first < W; first += 16) {
            __m256i c[GS][2];
            for (int r = 0; r < GS; ++r)
                c[r][0] = c[r][1] = _mm256_setzero_si256();
            for (int64_t q = start[g], end = start[g + 1]; q < end; ++q)
                add_quad<GS>(quad_of(x + first, idx + 4 * q, W), values + q * GS * 4, c);
            for (int r = 0; r < GS; ++r) {
                __m256i *out = reinterpret_cast<__m256i *>(acc + r * W + first);
                __m256i lo = _mm256_permute2x128_si256(c[r][0], c[r][1], 0x20);
                __m256i hi = _mm256_permute2x128_si256(c[r][0], c[r][1], 0x31);
                if (add) {
                    lo = _mm256_add_epi32(lo, _mm256_loadu_si256(out));
                    hi = _mm256_add_epi32(hi, _mm256_loadu_si256(out + 1));
                }
                _mm256_storeu_si256(out, lo);
                _mm256_storeu_si256(out + 1, hi);
            }
        }
}

void sparse_i8(int gs, int w, const uint8_t *x, const uint32_t *start, const uint16_t *idx,
               const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc) {
    if (w == 64)
        (gs == 4 ? sparse_i8_t<4, 64> : sparse_i8_t<1, 64>)(x, start, idx, values, g0, g1, add, acc);
    else
        (gs == 4 ? sparse_i8_t<4, 16> : sparse_i8_t<1, 16>)(x, start, idx, values, g0, g1, add, acc);
}

} // namespace
} // namespace tautorch
