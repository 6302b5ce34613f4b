// Depthwise convolution for instruction sets without a byte product: 16-bit pairs of taps through the
// compiler's vectors, which become vpmaddwd where there is one.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

void depthwise(const uint8_t *x, const int64_t *taps, int64_t quads, int64_t step, int pixels,
               const int8_t *w, int channels, int32_t *acc) {
    constexpr int kPanel = 64; // kTileN
    for (int p = 0; p < pixels; ++p, x += step, acc += kPanel)
        for (int c = 0; c < channels; c += L) {
            vi s = {};
            for (int64_t q = 0; q < quads; ++q) {
                const int8_t *wq = w + (q * kPanel + c) * 4;
#if defined(__AVX2__) && TT_LANES == 8
                // 8 channels: two taps' bytes side by side, widened, against two taps' weights.
                const auto at = [&](int i) {
                    return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(x + taps[4 * q + i] + c));
                };
                const __m128i lo = _mm_unpacklo_epi8(at(0), at(1)), hi = _mm_unpacklo_epi8(at(2), at(3));
                // [channel][4 taps]
                const __m256i even = _mm256_cvtepu8_epi16(_mm_unpacklo_epi16(lo, hi)),
                              odd = _mm256_cvtepu8_epi16(_mm_unpackhi_epi16(lo, hi));
                const auto weights = [&](int i) {
                    return _mm256_cvtepi8_epi16(
                        _mm_loadu_si128(reinterpret_cast<const __m128i *>(wq + 16 * i)));
                };
                const __m256i a = _mm256_madd_epi16(even, weights(0)), b = _mm256_madd_epi16(odd, weights(1));
                // Sums of pairs; channels 0 1 4 5 2 3 6 7 after vphaddd.
                s += (vi)_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xD8);
#else
                for (int i = 0; i < 4; ++i) {
                    const uint8_t *xt = x + taps[4 * q + i] + c;
                    for (int j = 0; j < L; ++j)
                        s[j] += int32_t{xt[j]} * wq[4 * j + i];
                }
#endif
            }
            store(acc + c, s);
        }
}

} // namespace
} // namespace tautorch
