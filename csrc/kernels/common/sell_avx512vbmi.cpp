#include "kernels/common/sell_avx512vbmi.h"

#include "kernels/common/finish_avx512vnni.h"

namespace tautorch {
namespace {

inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }
// In assembly, because GCC 12 copies accumulators around (and spills them) at every turn of the loop; through
// a local, because an array whose elements are operands of assembly stays in memory.
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, __m512i w) {
    __m512i sum = acc;
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    acc = sum;
}

// Lane l of a[r], output 4 (4 (l % 4) + l / 4) + r, to outputs in order, on top of what sums start from.
inline __attribute__((always_inline)) void in_order(const __m512i (&a)[4], const __m512i (&from)[4],
                                                    __m512i (&y)[4]) {
    const __m512i l01 = _mm512_unpacklo_epi32(a[0], a[1]), h01 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i l23 = _mm512_unpacklo_epi32(a[2], a[3]), h23 = _mm512_unpackhi_epi32(a[2], a[3]);
    y[0] = _mm512_add_epi32(from[0], _mm512_unpacklo_epi64(l01, l23));
    y[1] = _mm512_add_epi32(from[1], _mm512_unpackhi_epi64(l01, l23));
    y[2] = _mm512_add_epi32(from[2], _mm512_unpacklo_epi64(h01, h23));
    y[3] = _mm512_add_epi32(from[3], _mm512_unpackhi_epi64(h01, h23));
}

// The 64 bytes of a row from a slot's offset on, as operands. Turning is a kernel of its own: done for all,
// it made those that need none 8 to 10 % slower (80 % zeros, 128 and 1024 rows, Zen 4).
template <bool Turn> inline __attribute__((always_inline)) __m512i window(const uint8_t *p) {
    return Turn ? _mm512_xor_si512(_mm512_set1_epi8(static_cast<char>(0x80)), load512(p)) : load512(p);
}

// Groups of 4: four products share a gather. The window is an operand of vpermb in memory.
template <int R, bool Turn> void strip4(const SellI8 &p, int r0) {
    constexpr int U = R == 1 ? 2 : 1; // one row has 4 chains of products, fewer than their latency
    __m512i a[U][R][4];
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g)
                a[u][r][g] = _mm512_setzero_si512();
    const uint8_t *x[R], *s = p.data;
    for (int r = 0; r < R; ++r)
        x[r] = static_cast<const uint8_t *>(p.rows[r0 + r]);
    const auto step = [&](int64_t at, const uint8_t *d, __m512i(&c)[R][4]) __attribute__((always_inline)) {
        const int64_t o = p.offset[at];
        const __m512i places = load512(d);
        const __m512i w[4] = {load512(d + 64), load512(d + 128), load512(d + 192), load512(d + 256)};
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512i t = _mm512_permutexvar_epi8(places, window<Turn>(x[r] + o));
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g)
                dot(c[r][g], t, w[g]);
        }
    };
    // Lines that the tile will write, a row of them with every slot.
    const int64_t bytes = p.cols * size_of(p.epilogue->out_dtype);
    const char *line = p.out + r0 * p.row_bytes;
    int lines = R;
    int64_t i = 0;
    for (; i + U <= p.slots; i += U, s += 320 * U) {
        if (lines > 0) {
            for (int64_t b = 0; b < bytes; b += 64)
                prefetch_to_write(line + b);
            line += p.row_bytes;
            --lines;
        }
        step(i, s, a[0]);
        if constexpr (U == 2)
            step(i + 1, s + 320, a[1]);
    }
    if (U == 2 && i < p.slots)
        step(i, s, a[0]);
    __m512i from[4], y[R][4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
        from[v] = start(p, 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
        if constexpr (U == 2)
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g)
                a[0][r][g] = _mm512_add_epi32(a[0][r][g], a[1][r][g]);
        in_order(a[0][r], from, y[r]);
    }
    finish<R, 4>(p, 0, r0, y);
}

// Single outputs, several rows: a window stays in registers as long as the offset does (loads of windows that
// cross a cache line would bound the kernel: 43 % of peak instead of 57 at half the weights zero).
template <int R, bool Turn> void strip1(const SellI8 &p, int r0) {
    __m512i a[R][1];
    const __m512i from = start(p, 0);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
        a[r][0] = from;
    const uint8_t *x[R], *s = p.data;
    for (int r = 0; r < R; ++r)
        x[r] = static_cast<const uint8_t *>(p.rows[r0 + r]);
    for (int64_t i = 0; i < p.slots;) {
        const int64_t o = p.offset[i];
        __m512i at[R];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            at[r] = window<Turn>(x[r] + o);
        int64_t end = i + 1;
        while (end < p.slots && p.offset[end] == o)
            ++end;
        for (; i < end; ++i, s += 128) {
            const __m512i places = load512(s), w = load512(s + 64);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
                a[r][0] = _mm512_dpbusd_epi32(a[r][0], _mm512_permutexvar_epi8(places, at[r]), w);
        }
    }
    finish<R, 1>(p, 0, r0, a);
}

// Few rows: no branch on the offset, and as many chains of products as their latency asks for.
template <int R, bool Turn> void strip1_few(const SellI8 &p, int r0) {
    constexpr int U = R == 1 ? 4 : 2;
    __m512i a[U][R][1];
    const __m512i from = start(p, 0);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            a[u][r][0] = u == 0 ? from : _mm512_setzero_si512();
    const uint8_t *x[R], *s = p.data;
    for (int r = 0; r < R; ++r)
        x[r] = static_cast<const uint8_t *>(p.rows[r0 + r]);
    const auto step = [&](int64_t at, const uint8_t *d, __m512i(&c)[R][1]) __attribute__((always_inline)) {
        const int64_t o = p.offset[at];
        const __m512i places = load512(d), w = load512(d + 64);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            dot(c[r][0], _mm512_permutexvar_epi8(places, window<Turn>(x[r] + o)), w);
    };
    int64_t i = 0;
    for (; i + U <= p.slots; i += U, s += 128 * U)
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
            step(i + u, s + 128 * u, a[u]);
    for (; i < p.slots; ++i, s += 128)
        step(i, s, a[0]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int u = 1; u < U; ++u)
            a[0][r][0] = _mm512_add_epi32(a[0][r][0], a[u][r][0]);
    finish<R, 1>(p, 0, r0, a[0]);
}

using Strip = void (*)(const SellI8 &, int r0);
template <bool Turn>
constexpr Strip kStrip1[kSellRows1] = {strip1_few<1, Turn>, strip1_few<2, Turn>, strip1_few<3, Turn>,
                                       strip1_few<4, Turn>, strip1<5, Turn>,     strip1<6, Turn>,
                                       strip1<7, Turn>,     strip1<8, Turn>,     strip1<9, Turn>,
                                       strip1<10, Turn>,    strip1<11, Turn>,    strip1<12, Turn>};
template <bool Turn>
constexpr Strip kStrip4[kSellRows4] = {strip4<1, Turn>, strip4<2, Turn>, strip4<3, Turn>,
                                       strip4<4, Turn>, strip4<5, Turn>, strip4<6, Turn>};

} // namespace

void sell_i8_avx512vbmi(const SellI8 &given) {
    SellI8 s = given;
    if (const int done = s.gs == 4 ? sell_codes_avx512vbmi(s) : 0) {
        s.rows += done;
        s.row_scale += done;
        s.count -= done;
        s.out += done * s.row_bytes;
    }
    const Strip *strips =
        s.flip ? (s.gs == 4 ? kStrip4<true> : kStrip1<true>) : (s.gs == 4 ? kStrip4<false> : kStrip1<false>);
    // Rows are dealt out evenly.
    const int most = s.gs == 4 ? kSellRows4 : kSellRows1, tiles = (s.count + most - 1) / most;
    for (int t = 0; t < tiles; ++t) {
        const int r0 = s.count * t / tiles;
        strips[s.count * (t + 1) / tiles - r0 - 1](s, r0);
    }
}

} // namespace tautorch
