#include "kernels/common/product_w8.h"

#include <cmath>
#include <cstring>
#include <immintrin.h>

namespace tautorch {
namespace {

constexpr float kSpread = 0.36f;
constexpr int kMostCuts = 4;
constexpr int32_t kNotFinite = 0x7f800000;

inline __m512i load(const int8_t *p) {
    // Unsigned: w + 128.
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}

// Not the intrinsic, of whose sums GCC 12 keeps copies on the stack.
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

inline __mmask16 part(int64_t left) { return static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1); }

struct Spread {
    float largest, sum;
};

// Of the |x| up to `most`; infinite if any element is not finite.
Spread spread_of(const float *x, int64_t k, float most) {
    const __m512 bound = _mm512_set1_ps(most);
    __m512i largest = _mm512_setzero_si512();
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 16) {
        const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(part(k - i), x + i));
        const __mmask16 within = _mm512_cmp_ps_mask(v, bound, _CMP_NGT_UQ); // NaN, too
        largest = _mm512_mask_max_epu32(largest, within, largest, _mm512_castps_si512(v));
        sum = _mm512_mask_add_ps(sum, within, sum, v);
    }
    const auto bits = static_cast<int32_t>(_mm512_reduce_max_epu32(largest));
    Spread s = {INFINITY, INFINITY};
    if (bits < kNotFinite) {
        std::memcpy(&s.largest, &bits, 4);
        s.sum = _mm512_reduce_add_ps(sum);
    }
    return s;
}

// What becomes digits: least <= |x| <= largest < 2^exponent.
struct Range {
    float least, largest;
    int bits; // of the digits: the unit is 2^(exponent - bits)
    int exponent;
};

Range range_of(float largest, int digits) {
    int e = 0;
    if (largest > 0.0f)
        std::frexp(largest, &e);
    // Digits of -128 to 127 reach 127 * (2^16 + 2^8 + 1) and the float before it.
    const int bits = 8 * digits - 1;
    const float reach = digits == 3 ? 8355711.0f : 32639.0f;
    return {0.0f, largest, largest * power(bits - e) <= reach ? bits : bits - 1, e};
}

template <int Digits>
bool digits_of(const float *x, int64_t k, const Range &range, int64_t most, int8_t *data, int32_t *apart,
               DigitRow &row) {
    const int64_t whole = k / 4 * 4; // what is left of a group of 4 stays apart: nothing is read past it
    const __m512 up = _mm512_set1_ps(power(range.bits - range.exponent));
    const __m512 least = _mm512_set1_ps(range.least), largest = _mm512_set1_ps(range.largest);
    const __m512i halves = _mm512_set1_epi32(Digits == 3 ? 0x00808080 : 0x00008080);
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i close = Digits == 3
                              ? _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15)
                              : _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m512i sums = _mm512_setzero_si512();
    int32_t count = 0;
    for (int64_t i = 0; i < k; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(part(k - i), x + i), size = _mm512_abs_ps(v);
        __mmask16 in =
            _mm512_cmp_ps_mask(size, least, _CMP_GE_OQ) & _mm512_cmp_ps_mask(size, largest, _CMP_LE_OQ);
        if (i + 16 > whole)
            in &= part(whole - i);
        auto rest = static_cast<uint32_t>(
            _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(~in), v, _mm512_setzero_ps(), _CMP_NEQ_UQ));
        if (count + __builtin_popcount(rest) > most)
            return false;
        for (; rest != 0; rest &= rest - 1)
            apart[count++] = static_cast<int32_t>(i) + __builtin_ctz(rest);
        const __m512i q = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(in, v, up));
        // Adding 128 to every digit carries as balanced digits must; turning each top bit takes it away
        // again.
        const __m512i d =
            _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(q, halves), halves), by_digit);
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(-128), d);
        _mm512_storeu_si512(data + Digits * i, _mm512_permutexvar_epi32(close, d));
    }
    alignas(64) int32_t sum[16];
    _mm512_store_si512(sum, sums);
    for (int i = 0; i < Digits; ++i)
        row.offset[i] = sum[i] + sum[4 + i] + sum[8 + i] + sum[12 + i];
    row.x = x;
    row.data = data;
    row.digits = Digits;
    row.unit = power(range.exponent - range.bits);
    row.apart = apart;
    row.count = count;
    row.needs = 0.0f;
    return true;
}

template <int Rows, int Digits>
void digit_product(const DigitRow *rows, int64_t k, const int8_t *panel, float *out) {
    __m512i sum[Rows][Digits][4]; // columns 4 c to 4 c + 3 of every 16
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 3
        for (int d = 0; d < Digits; ++d)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c)
                sum[r][d][c] = _mm512_set1_epi32(-rows[r].offset[d]);
    const int8_t *w = panel, *x[Rows];
    for (int r = 0; r < Rows; ++r)
        x[r] = rows[r].data;
    for (int64_t q = 0; q < k / 4; ++q, w += 256) {
        const __m512i a = load(w), b = load(w + 64), c = load(w + 128), d = load(w + 192);
        const __m512i ab = _mm512_unpacklo_epi8(a, b), ab2 = _mm512_unpackhi_epi8(a, b);
        const __m512i cd = _mm512_unpacklo_epi8(c, d), cd2 = _mm512_unpackhi_epi8(c, d);
        const __m512i four[4] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd),
                                 _mm512_unpacklo_epi16(ab2, cd2), _mm512_unpackhi_epi16(ab2, cd2)};
#pragma GCC unroll 2
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 3
            for (int i = 0; i < Digits; ++i) {
                int32_t digit;
                std::memcpy(&digit, x[r] + 4 * i, 4);
                const __m512i four_x = _mm512_set1_epi32(digit);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    add_products(sum[r][i][j], four[j], four_x);
            }
            x[r] += 4 * Digits;
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
        __m512 y[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m512 v = _mm512_cvtepi32_ps(sum[r][Digits - 1][j]);
#pragma GCC unroll 2
            for (int d = Digits - 2; d >= 0; --d)
                v = _mm512_fmadd_ps(v, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sum[r][d][j]));
            y[j] = _mm512_mul_ps(v, _mm512_set1_ps(rows[r].unit));
        }
        // Lane l of vector j holds columns 16 l + 4 j.
        const __m512 a = _mm512_shuffle_f32x4(y[0], y[1], 0x44), b = _mm512_shuffle_f32x4(y[2], y[3], 0x44);
        const __m512 c = _mm512_shuffle_f32x4(y[0], y[1], 0xee), d = _mm512_shuffle_f32x4(y[2], y[3], 0xee);
        __m512 z[4] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd),
                       _mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd)};
        __m512 rest[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int32_t s = 0; s < rows[r].count; ++s) {
            const int64_t i = rows[r].apart[s];
            const __m512 xi = _mm512_set1_ps(rows[r].x[i]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v)
                rest[v] = _mm512_fmadd_ps(xi, widened(panel + 64 * i + 16 * v), rest[v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v)
            _mm512_storeu_ps(out + 64 * r + 16 * v, _mm512_add_ps(z[v], rest[v]));
    }
}

} // namespace

bool digit_row_avx512vnni(const float *x, int64_t k, int significant, int8_t *data, int32_t *apart,
                          DigitRow &row) {
    Spread s = spread_of(x, k, INFINITY);
    // Outside these bounds the powers of two, or the sum, would not be normal numbers.
    const auto normal = [&s] { return s.largest == 0.0f || (s.largest > 0x1p-90f && s.largest < 0x1p100f); };
    if (!normal())
        return false;
    if (significant < 24) {
        for (int digits = 2; digits <= 3; ++digits) {
            Range range = range_of(s.largest, digits);
            range.least = power(range.exponent - range.bits + significant - 1);
            const bool done = digits == 2 ? digits_of<2>(x, k, range, k / 16, data, apart, row)
                                          : digits_of<3>(x, k, range, most_apart(k), data, apart, row);
            if (done)
                return true;
        }
        return false;
    }
    const float inputs = static_cast<float>(k), most = kSpread / std::sqrt(4 * inputs);
    for (int i = 0; s.largest > most * s.sum; ++i) {
        if (i == kMostCuts)
            return false;
        s = spread_of(x, k, most * s.sum);
    }
    if (!normal()) // beside what stays apart
        return false;
    Range range = range_of(s.largest, 3);
    range.least = 2.0f / inputs * s.largest;
    if (!digits_of<3>(x, k, range, most_apart(k), data, apart, row))
        return false;
    const float needs = s.largest == 0.0f ? 0.0f : s.largest / s.sum * inputs / kSpread;
    row.needs = needs * needs;
    return true;
}

void digit_product_avx512vnni(const DigitRow *rows, int count, int64_t k, const int8_t *panel, float *out) {
    if (rows->digits == 2)
        count == 1 ? digit_product<1, 2>(rows, k, panel, out) : digit_product<2, 2>(rows, k, panel, out);
    else
        count == 1 ? digit_product<1, 3>(rows, k, panel, out) : digit_product<2, 3>(rows, k, panel, out);
}

} // namespace tautorch
