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

void transpose_32(const uint32_t *const *rows, int w, int64_t n, uint32_t *out, int64_t ld) {
    for (int i = 0; i < w; i += 4) {
        int64_t k = 0;
#if defined(__SSE2__)
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
#endif
        for (; k < n; ++k)
            for (int j = 0; j < 4; ++j)
                out[k * ld + i + j] = rows[i + j][k];
    }
}

} // namespace
} // namespace tautorch
