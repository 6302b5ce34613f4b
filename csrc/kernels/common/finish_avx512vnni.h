// How accumulators of an AVX-512 kernel leave from its registers: scaled, converted and stored right where
// they were summed, while the next tile's products already run. Through a tile in memory, each output costs a
// store and a load more, and nothing overlaps.
#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "kernels/common/product_i8.h"

namespace tautorch {
namespace {

// Bytes of what is fetched that fall to each of `steps` steps: a line at most.
inline int64_t fetch_rate(const ProductI8 &p, int64_t steps) {
    const int64_t rate = (p.next_bytes + steps - 1) / steps;
    return rate < 64 ? rate : 64;
}

// None where n is negative: the last strip of 32 outputs may have fewer than 16.
inline __mmask16 first(int64_t n) {
    return static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0);
}

// The high (1) or low (0) halves of two vectors' 32-bit lanes, in order.
template <int High> struct Halves {
    alignas(64) uint16_t at[32] = {};
    constexpr Halves() {
        for (int i = 0; i < 32; ++i)
            at[i] = static_cast<uint16_t>(2 * i + High);
    }
};
template <int High> constexpr Halves<High> kHalves;
template <int High> inline __m512i halves(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(kHalves<High>.at), b);
}

// To nearest, ties to even: 6 operations for 32 outputs. NaN must be the quiet one, which no carry turns into
// a number.
inline __m512i bf16_of(__m512 a, __m512 b) {
    const __m512i ai = _mm512_castps_si512(a), bi = _mm512_castps_si512(b);
    const __m512i high = halves<1>(ai, bi), low = halves<0>(ai, bi);
    const __m512i half =
        _mm512_sub_epi16(_mm512_set1_epi16(-0x8000), _mm512_and_si512(high, _mm512_set1_epi16(1)));
    return _mm512_mask_sub_epi16(high, _mm512_cmpgt_epu16_mask(low, half), high, _mm512_set1_epi16(-1));
}

// Clamping before rounding is the same, as the bounds are integers; so is clamping at 0 for relu. Of a quiet
// NaN the low bits that are kept are 0: it becomes the zero point.
struct Requantize {
    __m512 inv, lo, hi;
    __m512i zp;
    explicit Requantize(const Epilogue &e) {
        const int least = e.activation == Activation::relu ? 0 : -128 - e.out_zero_point;
        inv = _mm512_set1_ps(e.out_inv_scale);
        lo = _mm512_set1_ps(static_cast<float>(least));
        hi = _mm512_set1_ps(static_cast<float>(127 - e.out_zero_point));
        zp = _mm512_set1_epi16(static_cast<short>(e.out_zero_point));
    }
    // Whose low 16 bits are the integer without its zero point. min and max give back their second operand
    // where either is NaN.
    __attribute__((always_inline)) __m512i integers(__m512 y) const {
        const __m512 v = _mm512_min_ps(hi, _mm512_max_ps(lo, _mm512_mul_ps(y, inv)));
        return _mm512_castps_si512(_mm512_add_ps(v, _mm512_set1_ps(12582912.0f)));
    }
    __attribute__((always_inline)) __m256i operator()(__m512 a, __m512 b) const {
        return _mm512_cvtepi16_epi8(_mm512_add_epi16(halves<0>(integers(a), integers(b)), zp));
    }
};

inline __m512 quiet(__m512 y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")));
}

inline __m512 load_or(const float *values, int64_t i, int64_t left, float absent) {
    return values ? quiet(_mm512_maskz_loadu_ps(first(left), values + i)) : _mm512_set1_ps(absent);
}

// What the sums start from. Unsigned: correction * colsum may pass 2^31, the corrected sum does not.
inline __m512i start(const ToOutput &p, int64_t i) {
    const Epilogue &e = *p.epilogue;
    if (e.correction == 0)
        return _mm512_setzero_si512();
    return _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(first(p.cols - i), e.colsum + p.n0 + i),
                              _mm512_set1_epi32(e.correction));
}

// Columns from i on, rows from r0 on. By the arithmetic of epilogue.h.
template <int MR, int NV>
__attribute__((always_inline)) inline void finish(const ToOutput &p, int i, int r0,
                                                  const __m512i (&c)[MR][NV]) {
    const Epilogue &e = *p.epilogue;
    const int64_t left = p.cols - i, size = size_of(e.out_dtype);
    alignas(64) char partial[MR * NV * 64];
    const bool whole = left >= 16 * NV;
    const auto line = [&](int r) __attribute__((always_inline)) {
        return p.out + (p.out_row ? p.out_row[r0 + r] : r0 + r) * p.row_bytes + i * size;
    };
    const auto out_of = [&](int r) __attribute__((always_inline)) {
        return whole ? line(r) : partial + r * 16 * NV * size;
    };
    // Every loop over accumulators is unrolled: one that is not puts all of them into memory, from the first
    // product on.
    if (e.out_dtype == DType::i32) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            char *out = out_of(r);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                _mm512_storeu_si512(out + 64 * v, c[r][v]);
        }
    } else {
        __m512 w[NV], b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            w[v] = load_or(e.w_scale, p.n0 + i + 16 * v, left - 16 * v, 1.0f);
            b[v] = load_or(e.bias, p.n0 + i + 16 * v, left - 16 * v, 0.0f);
        }
        const auto each = [&](auto &&put) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int r = 0; r < MR; ++r) {
                char *out = out_of(r);
                const __m512 scale = _mm512_set1_ps(p.row_scale[r0 + r]);
                __m512 y[NV + 1]; // one more, so that all go by twos
                y[NV] = _mm512_setzero_ps();
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    y[v] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(c[r][v]), scale), w[v]);
                    if (e.addend)
                        y[v] = quiet(_mm512_add_ps(
                            y[v], _mm512_loadu_ps(e.addend + (r0 + r) * e.addend_stride + i + 16 * v)));
                    y[v] = _mm512_add_ps(y[v], b[v]);
                }
#pragma GCC unroll 2
                for (int v = 0; v < NV; v += 2)
                    put(out, v, y[v], y[v + 1]);
            }
        };
        // max gives back its second operand where either is NaN: a row of NaN stays one.
        const __m512 least =
            e.activation == Activation::relu ? _mm512_setzero_ps() : _mm512_set1_ps(-__builtin_inff());
        switch (e.out_dtype) {
        case DType::f32:
            each([least](char *o, int v, __m512 y, __m512 z) __attribute__((always_inline)) {
                _mm512_storeu_ps(o + 64 * v, _mm512_max_ps(least, y));
                if (v + 1 < NV)
                    _mm512_storeu_ps(o + 64 * v + 64, _mm512_max_ps(least, z));
            });
            break;
        case DType::bf16:
            each([least](char *o, int v, __m512 y, __m512 z) __attribute__((always_inline)) {
                const __m512i q = bf16_of(_mm512_max_ps(least, y), _mm512_max_ps(least, z));
                if (v + 1 < NV)
                    _mm512_storeu_si512(o + 32 * v, q);
                else
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(o + 32 * v), _mm512_castsi512_si256(q));
            });
            break;
        case DType::f16:
            each([least](char *o, int v, __m512 y, __m512 z) __attribute__((always_inline)) {
                const auto one = [&](int64_t at, __m512 f) __attribute__((always_inline)) {
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(o + at),
                                        _mm512_cvtps_ph(_mm512_max_ps(least, f), _MM_FROUND_TO_NEAREST_INT));
                };
                one(32 * v, y);
                if (v + 1 < NV)
                    one(32 * v + 32, z);
            });
            break;
        default: {
            const Requantize q(e);
            each([&q](char *o, int v, __m512 y, __m512 z) __attribute__((always_inline)) {
                if (v + 1 < NV)
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(o + 16 * v), q(y, z));
                else
                    _mm_storeu_si128(reinterpret_cast<__m128i *>(o + 16 * v),
                                     _mm256_castsi256_si128(q(y, z)));
            });
        }
        }
    }
    if (!whole)
        for (int r = 0; r < MR; ++r)
            std::memcpy(line(r), partial + r * 16 * NV * size, static_cast<size_t>(left * size));
}

inline bool finite(__m512 v) { return _mm512_fpclass_ps_mask(v, 0x99) == 0; }

// Whether int8 output of these rows may be taken for numbers, if its outputs' scales and biases are finite: a
// sum times 2^90 is, whatever its sign.
inline bool leaves_as_codes(const Epilogue &e, const float *row_scale, int rows) {
    if (e.out_dtype != DType::i8 || e.addend || !(e.out_inv_scale < 0x1p126f))
        return false;
    for (int r = 0; r < rows; r += 16) {
        const __mmask16 m = first(rows - r);
        const __m512 scale = _mm512_abs_ps(_mm512_maskz_loadu_ps(m, row_scale + r));
        if (_mm512_mask_cmp_ps_mask(m, scale, _mm512_set1_ps(0x1p90f), _CMP_NLE_UQ) != 0)
            return false;
    }
    return true;
}

// int8 -> the unsigned operand: q + 128 is q with its top bit turned.
inline void turn_top_bits(const char *q, int64_t bytes, void *out) {
    const __m512i top = _mm512_set1_epi8(-128);
    char *to = static_cast<char *>(out);
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64)
        _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(q + i), top));
    const __mmask64 rest = (uint64_t{1} << (bytes - i)) - 1;
    _mm512_mask_storeu_epi8(to + i, rest, _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, q + i), top));
}

} // namespace
} // namespace tautorch
