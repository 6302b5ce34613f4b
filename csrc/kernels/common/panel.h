// Transposition of a few rows into a k-major panel, and of a tile of 32-bit values.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

// out[k * ld + w] = rows[w][k] for w in [0, 16), k in [0, n)
inline void strip_u8(const uint8_t *const *rows, int64_t n, uint8_t *out, int64_t ld, uint8_t flip) {
    int64_t k = 0;
#if defined(__SSE2__)
    const __m128i turn = _mm_set1_epi8(static_cast<char>(flip));
    for (; k + 16 <= n; k += 16) {
        __m128i a[16], b[16];
        for (int i = 0; i < 16; ++i)
            a[i] = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[i] + k)), turn);
        // Four rounds of a perfect shuffle of 16 rows with byte interleaving transpose 16 x 16 bytes.
        for (int round = 0; round < 2; ++round) {
            for (int i = 0; i < 8; ++i) {
                b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
                b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
            }
            for (int i = 0; i < 8; ++i) {
                a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
                a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
            }
        }
        for (int i = 0; i < 16; ++i)
            _mm_storeu_si128(reinterpret_cast<__m128i *>(out + (k + i) * ld), a[i]);
    }
#endif
    for (; k < n; ++k)
        for (int w = 0; w < 16; ++w)
            out[k * ld + w] = static_cast<uint8_t>(rows[w][k] ^ flip);
}

void transpose_u8(const uint8_t *const *rows, int w, int64_t n, uint8_t *out, int64_t ld) {
    for (int i = 0; i < w; i += 16)
        strip_u8(rows + i, n, out + i, ld, 0);
}

#if TT_LANES != 16
void panel_u8(const uint8_t *const *rows, int w, int64_t n, uint8_t flip, uint8_t *out) {
    for (int i = 0; i < w; i += 16)
        strip_u8(rows + i, n, out + i, w, flip);
}
#else
// 64 rows: 16 inputs of rows i, i + 16, i + 32, i + 48 side by side in one register, then as strip_u8.
inline void panel64_u8(const uint8_t *const *rows, int64_t n, uint8_t flip, uint8_t *out) {
    const __m512i turn = _mm512_set1_epi8(static_cast<char>(flip));
    int64_t k = 0;
    for (; k + 16 <= n; k += 16) {
        __m512i a[16], b[16];
        const auto part = [&](int r) __attribute__((always_inline)) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[r] + k));
        };
        // Broadcasts under a mask: loads and no shuffles.
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            __m512i v = _mm512_castsi128_si512(part(i));
            v = _mm512_mask_broadcast_i32x4(v, 0x00f0, part(i + 16));
            v = _mm512_mask_broadcast_i32x4(v, 0x0f00, part(i + 32));
            v = _mm512_mask_broadcast_i32x4(v, 0xf000, part(i + 48));
            a[i] = _mm512_xor_si512(v, turn);
        }
        for (int round = 0; round < 2; ++round) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
                b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                a[2 * i] = _mm512_unpacklo_epi8(b[i], b[i + 8]);
                a[2 * i + 1] = _mm512_unpackhi_epi8(b[i], b[i + 8]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            _mm512_storeu_si512(out + (k + i) * 64, a[i]);
    }
    for (; k < n; ++k)
        for (int w = 0; w < 64; ++w)
            out[k * 64 + w] = static_cast<uint8_t>(rows[w][k] ^ flip);
}
void panel_u8(const uint8_t *const *rows, int w, int64_t n, uint8_t flip, uint8_t *out) {
    if (w == 64)
        return panel64_u8(rows, n, flip, out);
    for (int i = 0; i < w; i += 16)
        strip_u8(rows + i, n, out + i, w, flip);
}
#endif

#if defined(__SSE2__)
// Four columns of N rows (4, or a whole register's) at a time. Rows r, r + 4, .. lie side by side in the
// 128-bit lanes of one register; transposing 4 x 4 within lanes then gives N adjacent rows of each column.
template <int N> struct Columns;
template <> struct Columns<4> {
    typedef __m128 V;
    static V gather(const uint32_t *const *rows, int64_t k) {
        return _mm_loadu_ps(reinterpret_cast<const float *>(rows[0] + k));
    }
    static V lo(V a, V b) { return _mm_unpacklo_ps(a, b); }
    static V hi(V a, V b) { return _mm_unpackhi_ps(a, b); }
    static V low_pairs(V a, V b) { return _mm_movelh_ps(a, b); }
    static V high_pairs(V a, V b) { return _mm_movehl_ps(b, a); }
};
#if TT_LANES == 8
template <> struct Columns<8> {
    typedef __m256 V;
    static V gather(const uint32_t *const *rows, int64_t k) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(Columns<4>::gather(rows, k)),
                                    Columns<4>::gather(rows + 4, k), 1);
    }
    static V lo(V a, V b) { return _mm256_unpacklo_ps(a, b); }
    static V hi(V a, V b) { return _mm256_unpackhi_ps(a, b); }
    static V low_pairs(V a, V b) { return _mm256_shuffle_ps(a, b, 0x44); }
    static V high_pairs(V a, V b) { return _mm256_shuffle_ps(a, b, 0xee); }
};
#endif
#endif

// out[k * ld + i] = rows[i][k] for N rows.
template <int N> void strip_32(const uint32_t *const *rows, int64_t n, uint32_t *out, int64_t ld) {
    int64_t k = 0;
#if defined(__SSE2__)
    using C = Columns<N>;
    for (; k + 4 <= n; k += 4, out += 4 * ld) {
        const typename C::V a = C::gather(rows, k), b = C::gather(rows + 1, k), c = C::gather(rows + 2, k),
                            d = C::gather(rows + 3, k);
        const typename C::V ab = C::lo(a, b), cd = C::lo(c, d), ab2 = C::hi(a, b), cd2 = C::hi(c, d);
        store(out, C::low_pairs(ab, cd));
        store(out + ld, C::high_pairs(ab, cd));
        store(out + 2 * ld, C::low_pairs(ab2, cd2));
        store(out + 3 * ld, C::high_pairs(ab2, cd2));
    }
#endif
    for (; k < n; ++k, out += ld)
        for (int i = 0; i < N; ++i)
            out[i] = rows[i][k];
}

#if TT_LANES == 16
// out[k * ld + i] = rows[i][k], 16 x 16.
inline __attribute__((always_inline)) void turn16(const uint32_t *const *rows, int64_t k, uint32_t *out,
                                                  int64_t ld) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = _mm512_loadu_si512(rows[i] + k);
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

template <> void strip_32<16>(const uint32_t *const *rows, int64_t n, uint32_t *out, int64_t ld) {
    int64_t k = 0;
    for (; k + 16 <= n; k += 16)
        turn16(rows, k, out + k * ld, ld);
    for (; k < n; ++k)
        for (int i = 0; i < 16; ++i)
            out[k * ld + i] = rows[i][k];
}
#endif

void transpose_32(const uint32_t *const *rows, int w, int64_t n, uint32_t *out, int64_t ld) {
    int i = 0;
#if defined(__SSE2__)
    for (; i + L <= w; i += L)
        strip_32<L>(rows + i, n, out + i, ld);
#endif
    for (; i < w; i += 4)
        strip_32<4>(rows + i, n, out + i, ld);
}

} // namespace
} // namespace tautorch
