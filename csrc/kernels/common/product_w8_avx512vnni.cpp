#include "kernels/common/product_w8.h"

#include <cstring>
#include <immintrin.h>

namespace tautorch {
namespace {

inline __m512i load(const int8_t *p) {
    // Unsigned: w + 128.
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}

// Not the intrinsic, of whose 16 sums GCC 12 keeps copies on the stack.
inline void add_products(__m512i &sum, __m512i bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

inline __m512 widened(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}

inline float power(int e) { // 2^e, normal
    const int32_t bits = (e + 127) << 23;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

} // namespace

bool digit_row_avx512vnni(const float *x, int64_t k, int8_t *digits, int32_t *small, DigitRow &row) {
    const int64_t whole = k / 4 * 4; // what is left of a group of 4 counts as small: nothing is read past it
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    const auto part = [k](int64_t i) {
        return static_cast<__mmask16>(k - i >= 16 ? 0xffff : (1u << (k - i)) - 1);
    };
    for (int64_t i = 0; i < k; i += 16)
        most = _mm512_max_epu32(most, _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi32(part(i), x + i)));
    // The largest |x| is below 2^e. Outside these bounds the powers of two below would not be normal numbers.
    const auto largest = static_cast<int32_t>(_mm512_reduce_max_epu32(most));
    const int e = (largest >> 23) - 126;
    if (largest != 0 && (e < -90 || e > 120))
        return false;
    // 31 bits where digits of -128 to 127 reach so far: 127 * (2^24 + 2^16 + 2^8 + 1) and the float before
    // it.
    float amax;
    std::memcpy(&amax, &largest, 4);
    const int bits = largest == 0 || amax * power(31 - e - 32) * 4294967296.0f <= 2139062016.0f ? 31 : 30;
    const float up = largest == 0 ? 1.0f : power(bits - 31 - e) * 2147483648.0f;
    // From here up, all 24 bits of a float are above the unit.
    const __m512 least = _mm512_set1_ps(largest == 0 ? 0.0f : power(e - (bits - 23)));
    const __m512i halves = _mm512_set1_epi32(static_cast<int32_t>(0x80808080u));
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const int32_t limit = static_cast<int32_t>(k / 8);
    __m512i sums = _mm512_setzero_si512();
    int32_t count = 0;
    for (int64_t i = 0; i < k; i += 16) {
        const __mmask16 inside = part(i);
        const __m512 v = _mm512_maskz_loadu_ps(inside, x + i);
        __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(v), least, _CMP_GE_OQ);
        if (i + 16 > whole)
            large &= static_cast<__mmask16>((1u << (whole - i)) - 1);
        auto rest = static_cast<uint32_t>(
            _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(~large), v, _mm512_setzero_ps(), _CMP_NEQ_UQ));
        if (count + __builtin_popcount(rest) > limit + 3)
            return false;
        for (; rest != 0; rest &= rest - 1)
            small[count++] = static_cast<int32_t>(i) + __builtin_ctz(rest);
        const __m512i q = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(large, v, _mm512_set1_ps(up)));
        // Adding 128 to every digit carries as balanced digits must; turning each top bit takes it away
        // again.
        const __m512i d =
            _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(q, halves), halves), by_digit);
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(-128), d);
        _mm512_storeu_si512(digits + 4 * i, d);
    }
    alignas(64) int32_t sum[16];
    _mm512_store_si512(sum, sums);
    for (int i = 0; i < 4; ++i)
        row.offset[i] = sum[i] + sum[4 + i] + sum[8 + i] + sum[12 + i];
    row.x = x;
    row.digits = digits;
    row.unit = largest == 0 ? 0.0f : power(e - bits);
    row.small = small;
    row.smalls = count;
    return true;
}

void digit_product_avx512vnni(const DigitRow &row, int64_t k, const int8_t *panel, float *out) {
    __m512i sum[4][4]; // [digit][columns 4 c to 4 c + 3 of every 16]
#pragma GCC unroll 4
    for (int d = 0; d < 4; ++d)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c)
            sum[d][c] = _mm512_set1_epi32(-row.offset[d]);
    const int8_t *w = panel, *digits = row.digits;
    for (int64_t q = 0; q < k / 4; ++q, w += 256, digits += 16) {
        const __m512i a = load(w), b = load(w + 64), c = load(w + 128), d = load(w + 192);
        const __m512i ab = _mm512_unpacklo_epi8(a, b), ab2 = _mm512_unpackhi_epi8(a, b);
        const __m512i cd = _mm512_unpacklo_epi8(c, d), cd2 = _mm512_unpackhi_epi8(c, d);
        const __m512i four[4] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd),
                                 _mm512_unpacklo_epi16(ab2, cd2), _mm512_unpackhi_epi16(ab2, cd2)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            int32_t digit;
            std::memcpy(&digit, digits + 4 * i, 4);
            const __m512i x = _mm512_set1_epi32(digit);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                add_products(sum[i][j], four[j], x);
        }
    }
    __m512 y[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512 base = _mm512_set1_ps(256.0f);
        __m512 v = _mm512_cvtepi32_ps(sum[3][j]);
        v = _mm512_fmadd_ps(v, base, _mm512_cvtepi32_ps(sum[2][j]));
        v = _mm512_fmadd_ps(v, base, _mm512_cvtepi32_ps(sum[1][j]));
        v = _mm512_fmadd_ps(v, base, _mm512_cvtepi32_ps(sum[0][j]));
        y[j] = _mm512_mul_ps(v, _mm512_set1_ps(row.unit));
    }
    // Lane l of vector j holds columns 16 l + 4 j.
    const __m512 a = _mm512_shuffle_f32x4(y[0], y[1], 0x44), b = _mm512_shuffle_f32x4(y[2], y[3], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(y[0], y[1], 0xee), d = _mm512_shuffle_f32x4(y[2], y[3], 0xee);
    __m512 z[4] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd),
                   _mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd)};
    __m512 rest[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int32_t s = 0; s < row.smalls; ++s) {
        const int64_t i = row.small[s];
        const __m512 x = _mm512_set1_ps(row.x[i]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
            rest[v] = _mm512_fmadd_ps(x, widened(panel + 64 * i + 16 * v), rest[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
        _mm512_storeu_ps(out + 16 * v, _mm512_add_ps(z[v], rest[v]));
}

} // namespace tautorch
