#include "kernels/common/sell_avx512vbmi.h"

#include <immintrin.h>

namespace tautorch {
namespace {

inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }
// In assembly, because GCC 12 copies accumulators around (and spills them) at every turn of the loop.
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// Outputs 4 x 16: lane l of a[r] is output 4 (4 (l % 4) + l / 4) + r.
inline __attribute__((always_inline)) void store_groups(const __m512i (&a)[4], int32_t *out) {
    const __m512i l01 = _mm512_unpacklo_epi32(a[0], a[1]), h01 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i l23 = _mm512_unpacklo_epi32(a[2], a[3]), h23 = _mm512_unpackhi_epi32(a[2], a[3]);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(l01, l23));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(l01, l23));
    _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(h01, h23));
    _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(h01, h23));
}

// Groups of 4: four products share a gather. The window is an operand of vpermb in memory.
template <int R>
void strip4(const void *const *rows, const uint16_t *offset, int64_t slots, const uint8_t *s, int32_t *out,
            int64_t ld) {
    constexpr int U = R == 1 ? 2 : 1; // one row has 4 chains of products, fewer than their latency
    __m512i a[U][R][4];
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g)
                a[u][r][g] = _mm512_setzero_si512();
    const uint8_t *x[R];
    for (int r = 0; r < R; ++r)
        x[r] = static_cast<const uint8_t *>(rows[r]);
    const auto step = [&](int64_t at, const uint8_t *d, __m512i(&c)[R][4]) __attribute__((always_inline)) {
        const int64_t o = offset[at];
        const __m512i places = load512(d);
        const __m512i w[4] = {load512(d + 64), load512(d + 128), load512(d + 192), load512(d + 256)};
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512i t = _mm512_permutexvar_epi8(places, load512(x[r] + o));
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g)
                dot(c[r][g], t, w[g]);
        }
    };
    int64_t i = 0;
    for (; i + U <= slots; i += U, s += 320 * U) {
        step(i, s, a[0]);
        if constexpr (U == 2)
            step(i + 1, s + 320, a[1]);
    }
    if (U == 2 && i < slots)
        step(i, s, a[0]);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
        if constexpr (U == 2)
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g)
                a[0][r][g] = _mm512_add_epi32(a[0][r][g], a[1][r][g]);
        store_groups(a[0][r], out + r * ld);
    }
}

// Single outputs, several rows: a window stays in registers as long as the offset does (loads of windows that
// cross a cache line would bound the kernel: 43 % of peak instead of 57 at half the weights zero).
template <int R>
void strip1(const void *const *rows, const uint16_t *offset, int64_t slots, const uint8_t *s, int32_t *out,
            int64_t ld) {
    __m512i a[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
        a[r] = _mm512_setzero_si512();
    const uint8_t *x[R];
    for (int r = 0; r < R; ++r)
        x[r] = static_cast<const uint8_t *>(rows[r]);
    for (int64_t i = 0; i < slots;) {
        const int64_t o = offset[i];
        __m512i window[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            window[r] = load512(x[r] + o);
        int64_t end = i + 1;
        while (end < slots && offset[end] == o)
            ++end;
        for (; i < end; ++i, s += 128) {
            const __m512i places = load512(s), w = load512(s + 64);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
                a[r] = _mm512_dpbusd_epi32(a[r], _mm512_permutexvar_epi8(places, window[r]), w);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
        _mm512_storeu_si512(out + r * ld, a[r]);
}

// Few rows: no branch on the offset, and as many chains of products as their latency asks for.
template <int R>
void strip1_few(const void *const *rows, const uint16_t *offset, int64_t slots, const uint8_t *s,
                int32_t *out, int64_t ld) {
    constexpr int U = R == 1 ? 4 : 2;
    __m512i a[U][R];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            a[u][r] = _mm512_setzero_si512();
    const uint8_t *x[R];
    for (int r = 0; r < R; ++r)
        x[r] = static_cast<const uint8_t *>(rows[r]);
    const auto step = [&](int64_t at, const uint8_t *d, __m512i(&c)[R]) __attribute__((always_inline)) {
        const int64_t o = offset[at];
        const __m512i places = load512(d), w = load512(d + 64);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            dot(c[r], _mm512_permutexvar_epi8(places, load512(x[r] + o)), w);
    };
    int64_t i = 0;
    for (; i + U <= slots; i += U, s += 128 * U)
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
            step(i + u, s + 128 * u, a[u]);
    for (; i < slots; ++i, s += 128)
        step(i, s, a[0]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int u = 1; u < U; ++u)
            a[0][r] = _mm512_add_epi32(a[0][r], a[u][r]);
        _mm512_storeu_si512(out + r * ld, a[0][r]);
    }
}

using Strip = void (*)(const void *const *, const uint16_t *, int64_t, const uint8_t *, int32_t *, int64_t);
constexpr Strip kStrip1[kSellRows1] = {strip1_few<1>, strip1_few<2>, strip1_few<3>, strip1_few<4>,
                                       strip1<5>,     strip1<6>,     strip1<7>,     strip1<8>,
                                       strip1<9>,     strip1<10>,    strip1<11>,    strip1<12>};
constexpr Strip kStrip4[kSellRows4] = {strip4<1>, strip4<2>, strip4<3>, strip4<4>, strip4<5>, strip4<6>};

} // namespace

void sell_i8_avx512vbmi(int gs, const void *const *rows, int mr, const uint16_t *offset, int64_t slots,
                        const uint8_t *data, int32_t *acc, int64_t ld) {
    (gs == 4 ? kStrip4 : kStrip1)[mr - 1](rows, offset, slots, data, acc, ld);
}

} // namespace tautorch
