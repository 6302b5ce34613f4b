// Transposition of a few rows into a k-major panel, and of a tile of 32-bit values.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

#if defined(__SSE2__)
#define TT_TRANSPOSES
typedef __m128i Bytes16;
inline Bytes16 splat_byte(uint8_t x) { return _mm_set1_epi8(static_cast<char>(x)); }
inline Bytes16 low_bytes_of(Bytes16 a, Bytes16 b) { return _mm_unpacklo_epi8(a, b); }
inline Bytes16 high_bytes_of(Bytes16 a, Bytes16 b) { return _mm_unpackhi_epi8(a, b); }
#elif defined(__aarch64__)
#define TT_TRANSPOSES
typedef uint8x16_t Bytes16;
inline Bytes16 splat_byte(uint8_t x) { return vdupq_n_u8(x); }
inline Bytes16 low_bytes_of(Bytes16 a, Bytes16 b) { return vzip1q_u8(a, b); }
inline Bytes16 high_bytes_of(Bytes16 a, Bytes16 b) { return vzip2q_u8(a, b); }
#endif

// out[k * ld + w] = rows[w][k] for w in [0, 16), k in [0, n)
inline void strip_u8(const uint8_t *const *rows, int64_t n, uint8_t *out, int64_t ld, uint8_t flip) {
    int64_t k = 0;
#if defined(TT_TRANSPOSES)
    const Bytes16 turn = splat_byte(flip);
    for (; k + 16 <= n; k += 16) {
        Bytes16 a[16], b[16];
        for (int i = 0; i < 16; ++i)
            a[i] = load<Bytes16>(rows[i] + k) ^ turn;
        // Four rounds of a perfect shuffle of 16 rows with byte interleaving transpose 16 x 16 bytes.
        for (int round = 0; round < 2; ++round) {
            for (int i = 0; i < 8; ++i) {
                b[2 * i] = low_bytes_of(a[i], a[i + 8]);
                b[2 * i + 1] = high_bytes_of(a[i], a[i + 8]);
            }
            for (int i = 0; i < 8; ++i) {
                a[2 * i] = low_bytes_of(b[i], b[i + 8]);
                a[2 * i + 1] = high_bytes_of(b[i], b[i + 8]);
            }
        }
        for (int i = 0; i < 16; ++i)
            store(out + (k + i) * ld, a[i]);
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

#if defined(__aarch64__)
// out[k * 4 + w] = rows[w][k] for w in [0, 4)
inline void narrow_u8(const uint8_t *const *rows, int64_t n, uint8_t flip, uint8_t *out) {
    int64_t k = 0;
    const Bytes16 turn = splat_byte(flip);
    for (; k + 16 <= n; k += 16) {
        const Bytes16 a = load<Bytes16>(rows[0] + k) ^ turn, b = load<Bytes16>(rows[1] + k) ^ turn,
                      c = load<Bytes16>(rows[2] + k) ^ turn, d = load<Bytes16>(rows[3] + k) ^ turn;
        const Bytes16 ac = low_bytes_of(a, c), bd = low_bytes_of(b, d), ac2 = high_bytes_of(a, c),
                      bd2 = high_bytes_of(b, d);
        store(out + 4 * k, low_bytes_of(ac, bd));
        store(out + 4 * k + 16, high_bytes_of(ac, bd));
        store(out + 4 * k + 32, low_bytes_of(ac2, bd2));
        store(out + 4 * k + 48, high_bytes_of(ac2, bd2));
    }
    for (; k < n; ++k)
        for (int w = 0; w < 4; ++w)
            out[k * 4 + w] = static_cast<uint8_t>(rows[w][k] ^ flip);
}
#endif

#if TT_LANES != 16
void panel_u8(const uint8_t *const *rows, int w, int64_t n, uint8_t flip, uint8_t *out) {
#if defined(__aarch64__)
    if (w == 4)
        return narrow_u8(rows, n, flip, out);
#endif
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

#if defined(TT_TRANSPOSES)
// Four columns of N rows (4, or a whole register's) at a time. Rows r, r + 4, .. lie side by side in the
// 128-bit lanes of one register; transposing 4 x 4 within lanes then gives N adjacent rows of each column.
template <int N> struct Columns;
#if defined(__aarch64__)
template <> struct Columns<4> {
    typedef uint32x4_t V;
    static V gather(const uint32_t *const *rows, int64_t k) { return load<V>(rows[0] + k); }
    static V lo(V a, V b) { return vzip1q_u32(a, b); }
    static V hi(V a, V b) { return vzip2q_u32(a, b); }
    static V low_pairs(V a, V b) {
        return vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
    }
    static V high_pairs(V a, V b) {
        return vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b)));
    }
};
#else
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
#endif
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
#if defined(TT_TRANSPOSES)
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
#if defined(TT_TRANSPOSES)
    for (; i + L <= w; i += L)
        strip_32<L>(rows + i, n, out + i, ld);
#endif
    for (; i < w; i += 4)
        strip_32<4>(rows + i, n, out + i, ld);
}

} // namespace
} // namespace tautorch
