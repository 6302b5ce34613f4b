// Sparse int8 by input-major panels, on AVX-512 with VNNI.
//
// Four kept inputs are four panel rows of 64 bytes; 8 byte and word interleaves (4 a cycle on Zen 5) turn
// them into operands of vpdpbusd, 16 rows of x each. With 4 outputs to share the interleave the products
// bound the kernel (8 cycles per 1024 multiply-accumulates); with one output the 12 operations do (3 cycles
// per 256).
#include "kernels/common/sparse_avx512vnni.h"

#include <immintrin.h>

namespace tautorch {
namespace {

inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }
inline __m512i broadcast4(const void *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

// 64 rows of x for four inputs, whose bytes start at i[0..3]: t[j] holds rows 16 j .. 16 j + 15, four bytes
// each.
inline __attribute__((always_inline)) void interleave64(const uint8_t *x, const uint16_t *i,
                                                        __m512i (&t)[4]) {
    const __m512i r0 = load512(x + i[0]), r1 = load512(x + i[1]);
    const __m512i r2 = load512(x + i[2]), r3 = load512(x + i[3]);
    const __m512i l01 = _mm512_unpacklo_epi8(r0, r1), h01 = _mm512_unpackhi_epi8(r0, r1);
    const __m512i l23 = _mm512_unpacklo_epi8(r2, r3), h23 = _mm512_unpackhi_epi8(r2, r3);
    t[0] = _mm512_unpacklo_epi16(l01, l23);
    t[1] = _mm512_unpackhi_epi16(l01, l23);
    t[2] = _mm512_unpacklo_epi16(h01, h23);
    t[3] = _mm512_unpackhi_epi16(h01, h23);
}

// In assembly, because GCC 12 copies second accumulators around at every turn of the loop.
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

template <int GS>
void panel64(const uint8_t *x, const uint32_t *start, const uint16_t *idx, const int8_t *values, int64_t g0,
             int64_t g1, bool add, int32_t *out) {
    // One output has 4 chains of products, too few for their latency of 4 to 5 cycles: two sets of them.
    constexpr int U = GS == 1 ? 2 : 1;
    for (int64_t g = g0; g < g1; ++g, out += GS * 64) {
        __m512i c[U][GS][4];
        for (int r = 0; r < GS; ++r)
            for (int j = 0; j < 4; ++j)
                c[0][r][j] = add ? load512(out + r * 64 + 16 * j) : _mm512_setzero_si512();
        if constexpr (U == 2)
            for (int j = 0; j < 4; ++j)
                c[1][0][j] = _mm512_setzero_si512();
        const uint16_t *i = idx + 4 * int64_t{start[g]}, *end = idx + 4 * int64_t{start[g + 1]};
        const int8_t *v = values + 4 * GS * int64_t{start[g]};
        const auto step = [&](int at, __m512i(&acc)[GS][4]) __attribute__((always_inline)) {
            __m512i t[4];
            interleave64(x, i + 4 * at, t);
#pragma GCC unroll 4
            for (int r = 0; r < GS; ++r) {
                const __m512i w = broadcast4(v + (at * GS + r) * 4);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    dot(acc[r][j], t[j], w);
            }
        };
        for (; i + 4 * U <= end; i += 4 * U, v += 4 * U * GS)
#pragma GCC unroll 2
            for (int u = 0; u < U; ++u)
                step(u, c[u]);
        if (U == 2 && i < end)
            step(0, c[0]);
        for (int r = 0; r < GS; ++r)
            for (int j = 0; j < 4; ++j) {
                __m512i s = c[0][r][j];
                if constexpr (U == 2)
                    s = _mm512_add_epi32(s, c[1][r][j]);
                _mm512_storeu_si512(out + r * 64 + 16 * j, s);
            }
    }
}

// 16 rows: four panel rows side by side in one register, transposed to [row][4 inputs] by a dword and a
// byte shuffle.
template <int GS>
void panel16(const uint8_t *x, const uint32_t *start, const uint16_t *idx, const int8_t *values, int64_t g0,
             int64_t g1, bool add, int32_t *out) {
    const __m512i dwords = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes =
        _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    const auto row = [x](uint16_t i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(x + i / 4));
    };
    const auto interleave = [&](const uint16_t *i) __attribute__((always_inline)) {
        __m512i v = _mm512_castsi128_si512(row(i[0]));
        v = _mm512_inserti32x4(v, row(i[1]), 1);
        v = _mm512_inserti32x4(v, row(i[2]), 2);
        v = _mm512_inserti32x4(v, row(i[3]), 3);
        return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(dwords, v), bytes);
    };
    for (int64_t g = g0; g < g1; ++g, out += GS * 16) {
        __m512i c[2][GS];
        for (int r = 0; r < GS; ++r) {
            c[0][r] = add ? load512(out + r * 16) : _mm512_setzero_si512();
            c[1][r] = _mm512_setzero_si512();
        }
        int64_t q = start[g];
        const int64_t e = start[g + 1];
        const auto step = [&](int64_t at, __m512i(&acc)[GS]) __attribute__((always_inline)) {
            const __m512i t = interleave(idx + 4 * at);
#pragma GCC unroll 4
            for (int r = 0; r < GS; ++r)
                acc[r] = _mm512_dpbusd_epi32(acc[r], t, broadcast4(values + (at * GS + r) * 4));
        };
        for (; q + 2 <= e; q += 2) {
            step(q, c[0]);
            step(q + 1, c[1]);
        }
        if (q < e)
            step(q, c[0]);
        for (int r = 0; r < GS; ++r)
            _mm512_storeu_si512(out + r * 16, _mm512_add_epi32(c[0][r], c[1][r]));
    }
}

// out[k * ld + i] = rows[i][k], 16 x 16.
inline __attribute__((always_inline)) void turn16(const uint32_t *const *rows, int64_t k, uint32_t *out,
                                                  int64_t ld) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = load512(rows[i] + k);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    // a[4 g + c]: column 4 l + c of rows 4 g .. 4 g + 3 in lane l
#pragma GCC unroll 4
    for (int g = 0; g < 16; g += 4) {
        a[g] = _mm512_unpacklo_epi64(b[g], b[g + 2]);
        a[g + 1] = _mm512_unpackhi_epi64(b[g], b[g + 2]);
        a[g + 2] = _mm512_unpacklo_epi64(b[g + 1], b[g + 3]);
        a[g + 3] = _mm512_unpackhi_epi64(b[g + 1], b[g + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i l01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44),
                      h01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const __m512i l23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44),
                      h23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        _mm512_storeu_si512(out + c * ld, _mm512_shuffle_i32x4(l01, l23, 0x88));
        _mm512_storeu_si512(out + (4 + c) * ld, _mm512_shuffle_i32x4(l01, l23, 0xdd));
        _mm512_storeu_si512(out + (8 + c) * ld, _mm512_shuffle_i32x4(h01, h23, 0x88));
        _mm512_storeu_si512(out + (12 + c) * ld, _mm512_shuffle_i32x4(h01, h23, 0xdd));
    }
}

} // namespace

void sparse_i8_avx512vnni(int gs, int w, const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                          const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc) {
    if (w == 64)
        (gs == 4 ? panel64<4> : panel64<1>)(x, start, idx, values, g0, g1, add, acc);
    else
        (gs == 4 ? panel16<4> : panel16<1>)(x, start, idx, values, g0, g1, add, acc);
}

void transpose_32_wide(const uint32_t *const *rows, int w, int64_t n, uint32_t *out, int64_t ld) {
    int i = 0;
    for (; i + 16 <= w; i += 16) {
        int64_t k = 0;
        for (; k + 16 <= n; k += 16)
            turn16(rows + i, k, out + k * ld + i, ld);
        for (; k < n; ++k)
            for (int j = 0; j < 16; ++j)
                out[k * ld + i + j] = rows[i + j][k];
    }
    for (; i < w; i += 4) {
        int64_t k = 0;
        for (; k + 4 <= n; k += 4) {
            __m128 a = _mm_loadu_ps(reinterpret_cast<const float *>(rows[i] + k));
            __m128 b = _mm_loadu_ps(reinterpret_cast<const float *>(rows[i + 1] + k));
            __m128 c = _mm_loadu_ps(reinterpret_cast<const float *>(rows[i + 2] + k));
            __m128 d = _mm_loadu_ps(reinterpret_cast<const float *>(rows[i + 3] + k));
            _MM_TRANSPOSE4_PS(a, b, c, d);
            float *o = reinterpret_cast<float *>(out + k * ld + i);
            _mm_storeu_ps(o, a);
            _mm_storeu_ps(o + ld, b);
            _mm_storeu_ps(o + 2 * ld, c);
            _mm_storeu_ps(o + 3 * ld, d);
        }
        for (; k < n; ++k)
            for (int j = 0; j < 4; ++j)
                out[k * ld + i + j] = rows[i + j][k];
    }
}

} // namespace tautorch
