// Depthwise convolution on vpdpbusd: the bytes of four taps are interleaved so that each 32-bit lane holds
// one channel's four. The including file defines TT_DEPTHWISE_512 where it may use zmm registers, and
// depthwise_madd(acc, x, w) on ymm.
#pragma once

#include "kernels/common/interleave.h"

#include <cstdint>

namespace tautorch {
namespace {

// Weights are brought to the order of interleave_bytes once, the sums back once per pixel.
struct Ymm {
    static constexpr int kChannels = 32;
    using V = __m256i;
    static V load(const void *p) { return _mm256_loadu_si256(static_cast<const V *>(p)); }
    static void store(void *p, V v) { _mm256_storeu_si256(static_cast<V *>(p), v); }
    static V zero() { return _mm256_setzero_si256(); }
    static V add(V a, V b) { return _mm256_add_epi32(a, b); }
    static V madd(V acc, V x, V w) { return depthwise_madd(acc, x, w); }
    // Four registers between that order and the channels' own.
    static void to_order(const V *t, V *o) {
        o[0] = _mm256_permute2x128_si256(t[0], t[1], 0x20);
        o[1] = _mm256_permute2x128_si256(t[2], t[3], 0x20);
        o[2] = _mm256_permute2x128_si256(t[0], t[1], 0x31);
        o[3] = _mm256_permute2x128_si256(t[2], t[3], 0x31);
    }
    static void from_order(const V *o, V *t) {
        t[0] = _mm256_permute2x128_si256(o[0], o[2], 0x20);
        t[1] = _mm256_permute2x128_si256(o[0], o[2], 0x31);
        t[2] = _mm256_permute2x128_si256(o[1], o[3], 0x20);
        t[3] = _mm256_permute2x128_si256(o[1], o[3], 0x31);
    }
};

#if defined(TT_DEPTHWISE_512)
struct Zmm {
    static constexpr int kChannels = 64;
    using V = __m512i;
    static V load(const void *p) { return _mm512_loadu_si512(p); }
    static void store(void *p, V v) { _mm512_storeu_si512(p, v); }
    static V zero() { return _mm512_setzero_si512(); }
    static V add(V a, V b) { return _mm512_add_epi32(a, b); }
    static V madd(V acc, V x, V w) { return _mm512_dpbusd_epi32(acc, x, w); }
    // A 4 x 4 transposition of 128-bit parts: its own inverse.
    static void to_order(const V *t, V *o) {
        const V a = _mm512_shuffle_i32x4(t[0], t[1], 0x44), b = _mm512_shuffle_i32x4(t[0], t[1], 0xEE);
        const V c = _mm512_shuffle_i32x4(t[2], t[3], 0x44), d = _mm512_shuffle_i32x4(t[2], t[3], 0xEE);
        o[0] = _mm512_shuffle_i32x4(a, c, 0x88);
        o[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
        o[2] = _mm512_shuffle_i32x4(b, d, 0x88);
        o[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
    static void from_order(const V *o, V *t) { to_order(o, t); }
};
#endif

// S::kChannels channels; Q quads of taps, their weights w [Q][4] in the order of the products.
template <class S, int Q>
void depthwise_pass(const uint8_t *x, const int64_t *taps, int64_t step, int pixels, const int8_t *w,
                    bool first, int32_t *acc) {
    typename S::V v[Q][4];
    for (int q = 0; q < Q; ++q) {
        typename S::V o[4];
        for (int j = 0; j < 4; ++j)
            o[j] = S::load(w + q * 256 + j * S::kChannels);
        S::from_order(o, v[q]);
    }
    int64_t at[4 * Q];
    for (int t = 0; t < 4 * Q; ++t)
        at[t] = taps[t];
    for (int p = 0; p < pixels; ++p, x += step, acc += 64) {
        typename S::V s[4], t[4];
        for (int j = 0; j < 4; ++j)
            s[j] = S::zero();
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            interleave_bytes(S::load(x + at[4 * q]), S::load(x + at[4 * q + 1]), S::load(x + at[4 * q + 2]),
                             S::load(x + at[4 * q + 3]), t);
            for (int j = 0; j < 4; ++j)
                s[j] = S::madd(s[j], t[j], v[q][j]);
        }
        S::to_order(s, t);
        for (int j = 0; j < 4; ++j) {
            int32_t *to = acc + j * (S::kChannels / 4);
            if (!first) // later passes add
                t[j] = S::add(t[j], S::load(to));
            S::store(to, t[j]);
        }
    }
}

template <class S>
void depthwise_of(const uint8_t *x, const int64_t *taps, int64_t quads, int64_t step, int pixels,
                  const int8_t *w, int32_t *acc) {
    for (int64_t q = 0; q < quads;) {
        const int64_t left = quads - q, n = left >= 4 ? 4 : left;
        const auto pass = n == 4   ? depthwise_pass<S, 4>
                          : n == 3 ? depthwise_pass<S, 3>
                          : n == 2 ? depthwise_pass<S, 2>
                                   : depthwise_pass<S, 1>;
        pass(x, taps + 4 * q, step, pixels, w + q * 256, q == 0, acc);
        q += n;
    }
}

void depthwise(const uint8_t *x, const int64_t *taps, int64_t quads, int64_t step, int pixels,
               const int8_t *w, int channels, int32_t *acc) {
#if defined(TT_DEPTHWISE_512)
    if (channels > 32) {
        depthwise_of<Zmm>(x, taps, quads, step, pixels, w, acc);
        return;
    }
#endif
    for (int c = 0; c < channels; c += 32)
        depthwise_of<Ymm>(x + c, taps, quads, step, pixels, w + 4 * c, acc + c);
}

} // namespace
} // namespace tautorch
