// Four registers of bytes to operands of vpdpbusd.
#pragma once

#include <immintrin.h>

namespace tautorch {
namespace {

// t[0..3]: the bytes of r0 .. r3 side by side, four to a 32-bit element. Unpacking works within 128-bit
// parts: part l of t[j] has elements 16 l + 4 j + 0 .. 3.
inline __attribute__((always_inline)) void interleave_bytes(__m256i r0, __m256i r1, __m256i r2, __m256i r3,
                                                            __m256i *t) {
    const __m256i l01 = _mm256_unpacklo_epi8(r0, r1), h01 = _mm256_unpackhi_epi8(r0, r1);
    const __m256i l23 = _mm256_unpacklo_epi8(r2, r3), h23 = _mm256_unpackhi_epi8(r2, r3);
    t[0] = _mm256_unpacklo_epi16(l01, l23);
    t[1] = _mm256_unpackhi_epi16(l01, l23);
    t[2] = _mm256_unpacklo_epi16(h01, h23);
    t[3] = _mm256_unpackhi_epi16(h01, h23);
}

#if defined(__AVX512BW__)
inline __attribute__((always_inline)) void interleave_bytes(__m512i r0, __m512i r1, __m512i r2, __m512i r3,
                                                            __m512i *t) {
    const __m512i l01 = _mm512_unpacklo_epi8(r0, r1), h01 = _mm512_unpackhi_epi8(r0, r1);
    const __m512i l23 = _mm512_unpacklo_epi8(r2, r3), h23 = _mm512_unpackhi_epi8(r2, r3);
    t[0] = _mm512_unpacklo_epi16(l01, l23);
    t[1] = _mm512_unpackhi_epi16(l01, l23);
    t[2] = _mm512_unpacklo_epi16(h01, h23);
    t[3] = _mm512_unpackhi_epi16(h01, h23);
}
#endif

} // namespace
} // namespace tautorch
