// Float rows by int8 weights on NEON (see product_w8.h): each digit of a row is a row of dot_i8. The
// including file defines dot_i8 and its kKr before, and kDigitRows and kDigitSums of its DigitKernels.
#pragma once

#define TT_WIDENED
#include "kernels/common/dot_f32.h"

namespace tautorch {
namespace {

// Each digit's bytes together, filled up to 16; dot_i8 reads 12 further on.
inline int64_t digit_plane(int64_t k) { return round_up(k, 16) + 16; }

template <int D> struct Digits {
    int8_t *data;
    int64_t plane;
    Digits(int8_t *data, int64_t k) : data(data), plane(digit_plane(k)) {}
    __attribute__((always_inline)) void put(int64_t i, const vi (&d)[4]) {
        const auto b = [&](int p) { return vreinterpretq_s8_s32((int32x4_t)d[p]); };
        const int8x16_t even = vuzp1q_s8(b(0), b(1)), even2 = vuzp1q_s8(b(2), b(3));
        const int8x16_t odd = vuzp2q_s8(b(0), b(1)), odd2 = vuzp2q_s8(b(2), b(3));
        vst1q_s8(data + i, vuzp1q_s8(even, even2));
        vst1q_s8(data + plane + i, vuzp1q_s8(odd, odd2));
        if constexpr (D == 3)
            vst1q_s8(data + 2 * plane + i, vuzp2q_s8(even, even2));
    }
    void finish(DigitRow &) const {}
};

} // namespace
} // namespace tautorch
#include "kernels/common/digit_row.h"

namespace tautorch {
namespace {

inline vf as_floats(vi v) { return __builtin_convertvector(v, vf); }

// What stays apart of a row, times 4 * NV outputs of a panel.
template <int NV>
__attribute__((always_inline)) inline void products_apart(const DigitRow &row, const int8_t *panel, int width,
                                                          vf (&sum)[NV]) {
    for (int32_t s = 0; s < row.count; ++s) {
        const int64_t i = row.apart[s];
        // The four bytes that hold its weight, of every output.
        const int8_t *at = panel + i / kKr * (kKr * width) + i % kKr / 4 * 4;
        const int left = 24 - 8 * static_cast<int>(i % 4);
        const vf x = splat(row.x[i]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            vi w;
            for (int n = 0; n < 4; ++n)
                w[n] = load<int32_t>(at + (4 * v + n) * kKr);
            sum[v] = fma(x, as_floats((w << left) >> 24), sum[v]);
        }
    }
}

template <int D, int NV>
void combine(const DigitRow &row, const int32_t *sums, const int8_t *panel, int width, float *out) {
    vf rest[NV] = {};
    products_apart<NV>(row, panel, width, rest);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        vf y = as_floats(load<vi>(sums + (D - 1) * kTileN + 4 * v));
#pragma GCC unroll 2
        for (int d = D - 2; d >= 0; --d)
            y = fma(y, splat(256.0f), as_floats(load<vi>(sums + d * kTileN + 4 * v)));
        store(out + 4 * v, y * row.unit + rest[v]);
    }
}

template <int D>
void digit_product_t(const DigitRow *rows, int count, int64_t k, const int8_t *panel, int width, float *out) {
    const void *at[kDigitSums];
    for (int r = 0; r < count; ++r)
        for (int d = 0; d < D; ++d)
            at[r * D + d] = rows[r].data + d * digit_plane(k);
    alignas(64) int32_t sums[kDigitSums * kTileN];
    dot_i8(at, kDigitSums, count * D, 1, div_up(k, kKr), panel, width, sums);
    for (int r = 0; r < count; ++r) {
        const int32_t *s = sums + r * D * kTileN;
        if (width == 16)
            combine<D, 4>(rows[r], s, panel, width, out + r * kTileN);
        else
            for (int n = 0; n < width; n += 4)
                combine<D, 1>(rows[r], s + n, panel + n * kKr, width, out + r * kTileN + n);
    }
}
void digit_product(const DigitRow *rows, int count, int64_t k, const int8_t *panel, int width, float *out) {
    (rows->digits == 2 ? digit_product_t<2> : digit_product_t<3>)(rows, count, k, panel, width, out);
}

constexpr DigitKernels kDigits = {kDigitRows, kDigitSums, 4, digit_row, digit_product};

// [group of kKr inputs][output][kKr] to floats [input][output].
void widen(const int8_t *panel, int64_t groups, int width, float *out) {
    for (int64_t g = 0; g < groups; ++g, out += kKr * width)
        for (int n = 0; n < width; n += 4, panel += 4 * kKr) {
            const int32_t *p = reinterpret_cast<const int32_t *>(panel);
            int32x4_t w[kKr / 4]; // four inputs of four outputs
            if constexpr (kKr == 4) {
                w[0] = vld1q_s32(p);
            } else if constexpr (kKr == 8) {
                const int32x4x2_t two = vld2q_s32(p);
                w[0] = two.val[0], w[1] = two.val[1];
            } else {
                const int32x4x4_t four = vld4q_s32(p);
                w[0] = four.val[0], w[1] = four.val[1], w[2] = four.val[2], w[3] = four.val[3];
            }
#pragma GCC unroll 4
            for (int i = 0; i < kKr / 4; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    store(out + (4 * i + j) * width + n, as_floats(((vi)w[i] << (24 - 8 * j)) >> 24));
        }
}

} // namespace
} // namespace tautorch
