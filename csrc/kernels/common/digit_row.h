// A row of floats as digits, see product_w8.h. Every kernel makes the same ones: sums run in 16 lanes,
// however long a vector is. The including file defines TT_LANES, and how digits are laid out:
//   template <int D> struct Digits {
//       Digits(int8_t *data, int64_t k);
//       void put(int64_t i, const vi (&d)[kParts]); // of inputs i to i + 15, digit j in byte j of each
//       void finish(DigitRow &row);
//   };
#pragma once

#include "kernels/common/product_w8.h"
#include "kernels/common/simd.h"

#include <cmath>

namespace tautorch {
namespace {

constexpr float kSpread = 0.36f;
constexpr int kMostCuts = 4;
constexpr uint32_t kNotFinite = 0x7f800000;
constexpr int kParts = 16 / L; // vectors of 16 elements

inline float power(int e) { // 2^e, normal
    const int32_t bits = (e + 127) << 23;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// The next 16 elements, zeros where fewer are left.
__attribute__((always_inline)) inline void load16(const float *x, int64_t left, vf (&v)[kParts]) {
    float last[16];
    if (left < 16) {
        std::memset(last, 0, sizeof last);
        std::memcpy(last, x, static_cast<size_t>(4 * left));
        x = last;
    }
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p)
        v[p] = load<vf>(x + p * L);
}

// Bit i: lane i of the results of a comparison.
__attribute__((always_inline)) inline uint32_t bits_of(const vi (&m)[kParts]) {
#if TT_LANES == 16
    return _mm512_movepi32_mask((__m512i)m[0]);
#elif defined(__aarch64__)
    constexpr uint8_t kBit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const int16x8_t low = vcombine_s16(vmovn_s32((int32x4_t)m[0]), vmovn_s32((int32x4_t)m[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32((int32x4_t)m[2]), vmovn_s32((int32x4_t)m[3]));
    const int8x16_t all = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
    const uint8x16_t set = vandq_u8(vreinterpretq_u8_s8(all), vld1q_u8(kBit));
    return uint32_t{vaddv_u8(vget_low_u8(set))} | uint32_t{vaddv_u8(vget_high_u8(set))} << 8;
#endif
}

struct Spread {
    float largest, sum;
};

// Of the |x| up to `most`; infinite if any element is not finite.
Spread spread_of(const float *x, int64_t k, float most) {
    vu largest[kParts] = {};
    vf sum[kParts] = {};
    for (int64_t i = 0; i < k; i += 16) {
        vf v[kParts];
        load16(x + i, k - i, v);
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
            const vf size = abs(v[p]), within = size > most ? vf{} : size; // NaN, too
            largest[p] = tautorch::largest(largest[p], as_bits(within));
            sum[p] += within;
        }
    }
    float lane[16];
    for (int p = 0; p < kParts; ++p) {
        store(lane + p * L, sum[p]);
        largest[0] = tautorch::largest(largest[0], largest[p]);
    }
    const uint32_t bits = largest_lane(largest[0]);
    Spread s = {INFINITY, INFINITY};
    if (bits < kNotFinite) {
        std::memcpy(&s.largest, &bits, 4);
        for (int step = 8; step > 0; step /= 2)
            for (int i = 0; i < step; ++i)
                lane[i] += lane[i + step];
        s.sum = lane[0];
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

template <int D>
bool digits_of(const float *x, int64_t k, const Range &range, int64_t most, int8_t *data, int32_t *apart,
               DigitRow &row) {
    static const int32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t whole = k / 4 * 4; // what is left of a group of 4 stays apart: nothing is read past it
    const vf up = splat(power(range.bits - range.exponent));
    const int32_t halves = D == 3 ? 0x00808080 : 0x00008080;
    Digits<D> digits(data, k);
    int32_t count = 0;
    for (int64_t i = 0; i < k; i += 16) {
        vf v[kParts];
        vi in[kParts], rest[kParts], d[kParts];
        load16(x + i, k - i, v);
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
            const vf size = abs(v[p]);
            in[p] = (vi)(size >= range.least) & (vi)(size <= range.largest);
        }
        if (i + 16 > whole)
#pragma GCC unroll 4
            for (int p = 0; p < kParts; ++p)
                in[p] &= (vi)(load<vi>(kLane + p * L) < static_cast<int32_t>(whole - i));
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p)
            rest[p] = ~in[p] & (vi)(v[p] != 0.0f);
        for (uint32_t bits = bits_of(rest); bits != 0; bits &= bits - 1) {
            if (count == most)
                return false;
            apart[count++] = static_cast<int32_t>(i) + __builtin_ctz(bits);
        }
        // Adding 128 to every digit carries as balanced digits must; turning each top bit takes it away
        // again.
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p)
            d[p] = (nearest_int((vf)((vi)(v[p] * up) & in[p])) + halves) ^ halves;
        digits.put(i, d);
    }
    row.x = x;
    row.data = data;
    row.digits = D;
    row.unit = power(range.exponent - range.bits);
    row.apart = apart;
    row.count = count;
    row.needs = 0.0f;
    digits.finish(row);
    return true;
}

// DigitKernels::row.
bool digit_row(const float *x, int64_t k, int significant, int8_t *data, int32_t *apart, DigitRow &row) {
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

} // namespace
} // namespace tautorch
