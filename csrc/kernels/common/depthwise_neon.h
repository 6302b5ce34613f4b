// Depthwise convolution on NEON. Weights of 16 channels stay in registers while pixels pass. The including
// file defines TT_DOT_BYTES: 1 where there is SDOT, whose 32-bit lanes take one channel's four taps;
// otherwise taps are multiplied to 16 bits and added two at a time.
#pragma once

#include <arm_neon.h>
#include <cstdint>

namespace tautorch {
namespace {

constexpr int kMostQuads = 4; // of taps whose weights stay in registers

#if TT_DOT_BYTES
// t[j]: channels 4 j .. 4 j + 3 of four taps, a channel's side by side.
inline __attribute__((always_inline)) void interleave4(int8x16_t a, int8x16_t b, int8x16_t c, int8x16_t d,
                                                       int8x16_t *t) {
    const int16x8_t ab = vreinterpretq_s16_s8(vzip1q_s8(a, b)), ab2 = vreinterpretq_s16_s8(vzip2q_s8(a, b));
    const int16x8_t cd = vreinterpretq_s16_s8(vzip1q_s8(c, d)), cd2 = vreinterpretq_s16_s8(vzip2q_s8(c, d));
    t[0] = vreinterpretq_s8_s16(vzip1q_s16(ab, cd));
    t[1] = vreinterpretq_s8_s16(vzip2q_s16(ab, cd));
    t[2] = vreinterpretq_s8_s16(vzip1q_s16(ab2, cd2));
    t[3] = vreinterpretq_s8_s16(vzip2q_s16(ab2, cd2));
}
#endif

// 16 channels, Q quads of taps. Pairs: no weight is -128, so that two products fit 16 bits.
template <int Q, bool Pairs>
void depthwise_pass(const int8_t *x, const int64_t *taps, int64_t step, int pixels, const int8_t *w,
                    bool first, int32_t *acc) {
    int64_t at[4 * Q];
    for (int t = 0; t < 4 * Q; ++t)
        at[t] = taps[t];
    int8x16_t v[Q][4];
    for (int q = 0; q < Q; ++q) {
#if TT_DOT_BYTES
        for (int j = 0; j < 4; ++j)
            v[q][j] = vld1q_s8(w + q * 256 + 16 * j);
#else
        const int8x16x4_t by_tap = vld4q_s8(w + q * 256);
        for (int j = 0; j < 4; ++j)
            v[q][j] = by_tap.val[j];
#endif
    }
    for (int p = 0; p < pixels; ++p, x += step, acc += 64) {
        int32x4_t s[4];
        for (int j = 0; j < 4; ++j)
            s[j] = first ? vdupq_n_s32(0) : vld1q_s32(acc + 4 * j); // later passes add
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
#if TT_DOT_BYTES
            int8x16_t t[4];
            interleave4(vld1q_s8(x + at[4 * q]), vld1q_s8(x + at[4 * q + 1]), vld1q_s8(x + at[4 * q + 2]),
                        vld1q_s8(x + at[4 * q + 3]), t);
            for (int j = 0; j < 4; ++j)
                s[j] = vdotq_s32(s[j], t[j], v[q][j]);
#else
            const auto add = [&](int16x8_t low, int16x8_t high) __attribute__((always_inline)) {
                s[0] = vaddw_s16(s[0], vget_low_s16(low));
                s[1] = vaddw_high_s16(s[1], low);
                s[2] = vaddw_s16(s[2], vget_low_s16(high));
                s[3] = vaddw_high_s16(s[3], high);
            };
#pragma GCC unroll 2
            for (int i = 0; i < 4; i += 2) {
                const int8x16_t a = vld1q_s8(x + at[4 * q + i]), b = vld1q_s8(x + at[4 * q + i + 1]);
                const int8x16_t wa = v[q][i], wb = v[q][i + 1];
                int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(wa)), high = vmull_high_s8(a, wa);
                if constexpr (Pairs) {
                    low = vmlal_s8(low, vget_low_s8(b), vget_low_s8(wb));
                    high = vmlal_high_s8(high, b, wb);
                } else {
                    add(low, high);
                    low = vmull_s8(vget_low_s8(b), vget_low_s8(wb));
                    high = vmull_high_s8(b, wb);
                }
                add(low, high);
            }
#endif
        }
        for (int j = 0; j < 4; ++j)
            vst1q_s32(acc + 4 * j, s[j]);
    }
}

template <bool Pairs>
void depthwise_16(const int8_t *x, const int64_t *taps, int64_t quads, int64_t step, int pixels,
                  const int8_t *w, int32_t *acc) {
    for (int64_t q = 0; q < quads;) {
        const int64_t left = quads - q, n = left >= kMostQuads ? kMostQuads : left;
        const auto pass = n == 4   ? depthwise_pass<4, Pairs>
                          : n == 3 ? depthwise_pass<3, Pairs>
                          : n == 2 ? depthwise_pass<2, Pairs>
                                   : depthwise_pass<1, Pairs>;
        pass(x, taps + 4 * q, step, pixels, w + q * 256, q == 0, acc);
        q += n;
    }
}

void depthwise(const uint8_t *bytes, const int64_t *taps, int64_t quads, int64_t step, int pixels,
               const int8_t *w, int channels, int32_t *acc) {
    const int8_t *x = reinterpret_cast<const int8_t *>(bytes);
    for (int c = 0; c < channels; c += 16) {
#if !TT_DOT_BYTES
        int8x16_t least = vdupq_n_s8(0);
        for (int64_t i = 0; i < 4 * quads; ++i)
            least = vminq_s8(least, vld1q_s8(w + i / 4 * 256 + 4 * c + i % 4 * 16));
        if (vminvq_s8(least) == -128) {
            depthwise_16<false>(x + c, taps, quads, step, pixels, w + 4 * c, acc + c);
            continue;
        }
#endif
        depthwise_16<true>(x + c, taps, quads, step, pixels, w + 4 * c, acc + c);
    }
}

} // namespace
} // namespace tautorch
