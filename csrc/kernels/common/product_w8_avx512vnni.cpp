#include "kernels/common/product_w8.h"

#define TT_LANES 16
#include "kernels/common/simd.h"

namespace tautorch {
namespace {

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

// [k / 4][digit][4 inputs], and 128 times each digit's sum.
template <int D> struct Digits {
    int8_t *data;
    __m512i sums = _mm512_setzero_si512();
    Digits(int8_t *data, int64_t) : data(data) {}
    void put(int64_t i, const vi (&d)[1]) {
        const __m512i by_digit =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        const __m512i close = D == 3
                                  ? _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15)
                                  : _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        const __m512i turned = _mm512_shuffle_epi8((__m512i)d[0], by_digit);
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(-128), turned);
        _mm512_storeu_si512(data + D * i, _mm512_permutexvar_epi32(close, turned));
    }
    void finish(DigitRow &row) const {
        alignas(64) int32_t sum[16];
        _mm512_store_si512(sum, sums);
        for (int i = 0; i < D; ++i)
            row.offset[i] = sum[i] + sum[4 + i] + sum[8 + i] + sum[12 + i];
    }
};

} // namespace
} // namespace tautorch
#include "kernels/common/digit_row.h"

namespace tautorch {
namespace {

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

void product(const DigitRow *rows, int count, int64_t k, const int8_t *panel, int, float *out) {
    if (rows->digits == 2)
        count == 1 ? digit_product<1, 2>(rows, k, panel, out) : digit_product<2, 2>(rows, k, panel, out);
    else
        count == 1 ? digit_product<1, 3>(rows, k, panel, out) : digit_product<2, 3>(rows, k, panel, out);
}

} // namespace

const DigitKernels digits_avx512vnni = {INT64_MAX, 6, 64, digit_row, product};

} // namespace tautorch
