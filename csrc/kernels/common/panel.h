// Transposition of a few rows into a k-major panel, and of a tile of 32-bit values.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

// out[k * ld + w] = rows[w][k] for w in [0, 16), k in [0, n)
inline void strip_u8(const uint8_t *const *rows, int64_t n, uint8_t *out, int64_t ld) {
    int64_t k = 0;
#if defined(__SSE2__)
    for (; k + 16 <= n; k += 16) {
        __m128i a[16], b[16];
        for (int i = 0; i < 16; ++i)
            a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[i] + k));
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
            out[k * ld + w] = rows[w][k];
}

void transpose_u8(const uint8_t *const *rows, int w, int64_t n, uint8_t *out, int64_t ld) {
    for (int i = 0; i < w; i += 16)
        strip_u8(rows + i, n, out + i, ld);
}

#if TT_LANES < 16 // AVX-512 has its own: sparse_avx512vnni.cpp
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
#if TT_LANES >= 8
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

void transpose_32(const uint32_t *const *rows, int w, int64_t n, uint32_t *out, int64_t ld) {
    int i = 0;
#if defined(__SSE2__)
    for (; i + L <= w; i += L)
        strip_32<L>(rows + i, n, out + i, ld);
#endif
    for (; i < w; i += 4)
        strip_32<4>(rows + i, n, out + i, ld);
}
#endif

} // namespace
} // namespace tautorch
