// int8 output of SELL strips in groups of 4: the sums of three rows leave while the next three rows' products
// run, as in product_i8_codes_avx512vnni.cpp. 64 outputs of a row cost 12 multiplications, which on Zen 4
// take the products' two pipes. Codes are put in order as bytes, by one vpermb, not as sums, by 8 unpacks.
#include "kernels/common/finish_avx512vnni.h"
#include "kernels/common/sell_avx512vbmi.h"

namespace tautorch {
namespace {

constexpr int kRows = 3;
// Slots of a strip that stay in L1 beside the rows: each three rows read them again.
constexpr int64_t kMostSlots = 80;
using Sums = __m512i[kRows][4];

// 4 x 4 lanes of every 128 bits change places: lane l of sum g is output 16 (l % 4) + 4 (l / 4) + g.
inline void turn(const __m512i (&y)[4], __m512i (&c)[4]) {
    const __m512i l01 = _mm512_unpacklo_epi32(y[0], y[1]), h01 = _mm512_unpackhi_epi32(y[0], y[1]);
    const __m512i l23 = _mm512_unpacklo_epi32(y[2], y[3]), h23 = _mm512_unpackhi_epi32(y[2], y[3]);
    c[0] = _mm512_unpacklo_epi64(l01, l23);
    c[1] = _mm512_unpackhi_epi64(l01, l23);
    c[2] = _mm512_unpacklo_epi64(h01, h23);
    c[3] = _mm512_unpackhi_epi64(h01, h23);
}

// Where each output's code is once the sums are packed to bytes.
struct Order {
    alignas(64) uint8_t at[64] = {};
    constexpr Order() {
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j)
                for (int g = 0; g < 4; ++g)
                    at[16 * i + 4 * j + g] = static_cast<uint8_t>(16 * j + 4 * g + i);
    }
};
constexpr Order kOrder;

// What turns the sums of 64 outputs into their codes, by lane.
struct Scales {
    alignas(64) float w[4][16];
    alignas(64) float bias[4][16];
    alignas(64) int32_t start[4][16]; // what the sums begin with
    alignas(64) int16_t zero[32];     // zero point
    alignas(64) int8_t least[64];     // what codes are at least
    float inv, hi;
    __mmask64 outputs; // that there are
};

// By the arithmetic of epilogue.h; saturation does for the lower bounds. The operands in memory leave the
// registers to two tiles.
template <bool Whole>
__attribute__((always_inline)) inline void finish_row(const Scales &e, __m512i (&c)[4],
                                                      const float &row_scale, char *out) {
    __m512i c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
    asm("vcvtdq2ps %0, %0\n\tvcvtdq2ps %1, %1\n\tvcvtdq2ps %2, %2\n\tvcvtdq2ps %3, %3\n\t"
        "vmulps %4%{1to16%}, %0, %0\n\tvmulps %4%{1to16%}, %1, %1\n\t"
        "vmulps %4%{1to16%}, %2, %2\n\tvmulps %4%{1to16%}, %3, %3\n\t"
        "vmulps %5, %0, %0\n\tvmulps %6, %1, %1\n\tvmulps %7, %2, %2\n\tvmulps %8, %3, %3\n\t"
        "vaddps %9, %0, %0\n\tvaddps %10, %1, %1\n\tvaddps %11, %2, %2\n\tvaddps %12, %3, %3\n\t"
        "vmulps %13%{1to16%}, %0, %0\n\tvmulps %13%{1to16%}, %1, %1\n\t"
        "vmulps %13%{1to16%}, %2, %2\n\tvmulps %13%{1to16%}, %3, %3\n\t"
        "vminps %14%{1to16%}, %0, %0\n\tvminps %14%{1to16%}, %1, %1\n\t"
        "vminps %14%{1to16%}, %2, %2\n\tvminps %14%{1to16%}, %3, %3\n\t"
        "vcvtps2dq %0, %0\n\tvcvtps2dq %1, %1\n\tvcvtps2dq %2, %2\n\tvcvtps2dq %3, %3\n\t"
        "vpackssdw %1, %0, %0\n\tvpackssdw %3, %2, %2\n\t"
        "vpaddsw %15, %0, %0\n\tvpaddsw %15, %2, %2\n\t"
        "vpacksswb %2, %0, %0\n\tvpmaxsb %16, %0, %0\n\t"
        "vmovdqa64 %17, %1\n\tvpermb %0, %1, %0"
        : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3)
        : "m"(row_scale), "m"(e.w[0]), "m"(e.w[1]), "m"(e.w[2]), "m"(e.w[3]), "m"(e.bias[0]), "m"(e.bias[1]),
          "m"(e.bias[2]), "m"(e.bias[3]), "m"(e.inv), "m"(e.hi), "m"(e.zero), "m"(e.least), "m"(kOrder.at));
    if (Whole)
        _mm512_storeu_si512(out, c0);
    else
        _mm512_mask_storeu_epi8(out, e.outputs, c0);
}

// Through a local, because an array whose elements are operands of assembly stays in memory.
__attribute__((always_inline)) inline void dot(__m512i &acc, __m512i x, __m512i w) {
    __m512i sum = acc;
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    acc = sum;
}

template <bool Turn>
__attribute__((always_inline)) inline void step(Sums &c, const uint8_t *const (&x)[kRows], int64_t offset,
                                                const uint8_t *d) {
    // GCC 12 would load them again for each row.
    const auto load = [d](int i) __attribute__((always_inline)) {
        __m512i v = _mm512_loadu_si512(d + 64 * i);
        asm("" : "+v"(v));
        return v;
    };
    const __m512i places = load(0), w[4] = {load(1), load(2), load(3), load(4)};
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
        __m512i window = _mm512_loadu_si512(x[r] + offset);
        if (Turn)
            window = _mm512_xor_si512(window, _mm512_set1_epi8(static_cast<char>(0x80)));
        const __m512i bytes = _mm512_permutexvar_epi8(places, window);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g)
            dot(c[r][g], bytes, w[g]);
    }
}

// Products of the rows from r0 on, while the sums of the rows from r1 on leave.
template <bool Turn, bool Whole>
__attribute__((always_inline)) inline void tile(const SellI8 &p, const Scales &e, Sums &c, int r0,
                                                Sums &before, int r1) {
    const uint8_t *x[kRows], *s = p.data;
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
        x[r] = static_cast<const uint8_t *>(p.rows[r0 + r]);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g)
            c[r][g] = _mm512_load_si512(e.start[g]);
    }
    int64_t i = 0;
#pragma GCC unroll 3
    for (; i < kRows; ++i) {
        if (i < p.slots) {
            step<Turn>(c, x, p.offset[i], s);
            s += 320;
        }
        finish_row<Whole>(e, before[i], p.row_scale[r1 + i], p.out + (r1 + i) * p.row_bytes);
        prefetch_to_write(p.out + (r0 + i) * p.row_bytes);
    }
    for (; i < p.slots; ++i, s += 320)
        step<Turn>(c, x, p.offset[i], s);
}

// The first `count` rows, a multiple of kRows.
template <bool Turn, bool Whole>
__attribute__((noinline)) void strip(const SellI8 &p, const Scales &e, int count) {
    Sums a, b;
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g)
            b[r][g] = _mm512_setzero_si512();
    const auto leave = [&](Sums &c, int r0) __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int r = 0; r < kRows; ++r)
            finish_row<Whole>(e, c[r], p.row_scale[r0 + r], p.out + (r0 + r) * p.row_bytes);
    };
    // The first tile finds none before it: what it writes, it writes over.
    tile<Turn, Whole>(p, e, a, 0, b, 0);
    int r = kRows;
    for (; r + kRows < count; r += 2 * kRows) {
        tile<Turn, Whole>(p, e, b, r, a, r - kRows);
        tile<Turn, Whole>(p, e, a, r + kRows, b, r);
    }
    if (r == count)
        return leave(a, r - kRows);
    tile<Turn, Whole>(p, e, b, r, a, r - kRows);
    leave(b, r);
}

// False where an output may be NaN, which finish_row takes for a number.
bool scales_of(const SellI8 &p, Scales &to) {
    const Epilogue &e = *p.epilogue;
    to.outputs = p.cols >= 64 ? ~__mmask64{0} : (__mmask64{1} << p.cols) - 1;
    __m512i w[4], b[4], from[4], lanes[4];
    for (int v = 0; v < 4; ++v) {
        const int64_t at = p.n0 + 16 * v;
        const __mmask16 m = static_cast<__mmask16>(to.outputs >> 16 * v);
        const __m512 scale = e.w_scale ? _mm512_maskz_loadu_ps(m, e.w_scale + at) : _mm512_set1_ps(1.0f),
                     bias = e.bias ? _mm512_maskz_loadu_ps(m, e.bias + at) : _mm512_setzero_ps();
        if (!finite(scale) || !finite(bias))
            return false;
        w[v] = _mm512_castps_si512(scale);
        b[v] = _mm512_castps_si512(bias);
        from[v] = start(p, 16 * v);
    }
    const auto put = [&lanes](const __m512i(&values)[4], void *out) {
        turn(values, lanes);
        for (int g = 0; g < 4; ++g)
            _mm512_store_si512(static_cast<char *>(out) + 64 * g, lanes[g]);
    };
    put(w, to.w);
    put(b, to.bias);
    put(from, to.start);
    _mm512_store_si512(to.zero, _mm512_set1_epi16(static_cast<short>(e.out_zero_point)));
    _mm512_store_si512(to.least, _mm512_set1_epi8(static_cast<char>(
                                     e.activation == Activation::relu ? e.out_zero_point : -128)));
    to.inv = e.out_inv_scale;
    to.hi = static_cast<float>(127 - e.out_zero_point);
    return true;
}

} // namespace

int sell_codes_avx512vbmi(const SellI8 &p) {
    const int count = p.count / kRows * kRows;
    Scales e;
    if (count == 0 || p.slots > kMostSlots || !leaves_as_codes(*p.epilogue, p.row_scale, count) ||
        !scales_of(p, e))
        return 0;
    const bool whole = p.cols >= 64;
    if (p.flip)
        whole ? strip<true, true>(p, e, count) : strip<true, false>(p, e, count);
    else
        whole ? strip<false, true>(p, e, count) : strip<false, false>(p, e, count);
    return count;
}

} // namespace tautorch
