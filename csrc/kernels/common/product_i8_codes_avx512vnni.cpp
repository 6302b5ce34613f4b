// int8 output: a tile's sums leave while the next tile's products run. On Zen 4 the products take two of the
// four vector pipes and most of what bounds and narrows a sum the other two. But the sums of a whole tile,
// one after another, fill all that the core looks ahead: 16 outputs of 64 inputs took 23.1 cycles, 16 of them
// products. Here two tiles of 6 x 32 take turns, and each of the first six steps of the one finishes a row of
// the other: 19.8.
#include "kernels/common/finish_avx512vnni.h"

namespace tautorch {
namespace {

constexpr int kRows = 6;
using Sums = __m512i[kRows][2];

// Outputs of a strip: 32, fewer than that, at most 24 (the last ones in half a vector, which on Zen 4 takes
// half the time) or at most 16.
enum class Form { whole, part, narrow, one };

// What turns the sums of 32 outputs into their codes.
struct Scales {
    alignas(64) float w[2][16];
    alignas(64) float bias[2][16];
    __m512i start[2]; // what the sums begin with
    float inv, lo, hi;
    int32_t zp;
    __mmask32 outputs; // that there are
};

// By the arithmetic of epilogue.h. The operands in memory leave the registers to two tiles.
template <Form F>
__attribute__((always_inline)) inline void finish_row(const Scales &e, __m512i c0, __m512i c1,
                                                      const float &row_scale, char *out) {
    __m512i y0, y1;
    asm("vcvtdq2ps %2, %0\n\t"
        "vcvtdq2ps %3, %1\n\t"
        "vmulps %4%{1to16%}, %0, %0\n\t"
        "vmulps %4%{1to16%}, %1, %1\n\t"
        "vmulps %5, %0, %0\n\t"
        "vmulps %6, %1, %1\n\t"
        "vaddps %7, %0, %0\n\t"
        "vaddps %8, %1, %1\n\t"
        "vmulps %9%{1to16%}, %0, %0\n\t"
        "vmulps %9%{1to16%}, %1, %1\n\t"
        "vmaxps %10%{1to16%}, %0, %0\n\t"
        "vmaxps %10%{1to16%}, %1, %1\n\t"
        "vminps %11%{1to16%}, %0, %0\n\t"
        "vminps %11%{1to16%}, %1, %1\n\t"
        "vcvtps2dq %0, %0\n\t"
        "vcvtps2dq %1, %1\n\t"
        "vpackssdw %1, %0, %0"
        : "=&v"(y0), "=&v"(y1)
        : "v"(c0), "v"(c1), "m"(row_scale), "m"(e.w[0]), "m"(e.w[1]), "m"(e.bias[0]), "m"(e.bias[1]),
          "m"(e.inv), "m"(e.lo), "m"(e.hi));
    // Four outputs of the one vector and four of the other lie in turn.
    const __m256i codes = _mm256_permutevar8x32_epi32(
        _mm512_cvtepi16_epi8(_mm512_add_epi16(y0, _mm512_set1_epi16(static_cast<short>(e.zp)))),
        _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    if (F == Form::whole)
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), codes);
    else
        _mm256_mask_storeu_epi8(out, e.outputs, codes);
}

// The rows of a tile under one tap. Even: at one distance from each other.
template <bool Even> struct Rows {
    const char *at[Even ? 2 : kRows];
    int64_t step;
    Rows(const ProductI8 &p, int64_t tap, int r0) : step(p.row_step) {
        const void *const *rows = p.rows + tap * p.ld;
        for (int i = 0; i < (Even ? 2 : kRows); ++i)
            at[i] =
                static_cast<const char *>(Even ? rows[0] : rows[r0 + i]) + (Even ? (r0 + 3 * i) * step : 0);
    }
    __attribute__((always_inline)) const char *operator[](int r) const {
        return Even ? at[r / 3] + r % 3 * step : at[r];
    }
};

// Four inputs, q steps after the rows' first.
template <bool Even, Form F>
__attribute__((always_inline)) inline void step(Sums &c, const int8_t *b, const Rows<Even> &x, int64_t q) {
    const __m512i w0 = _mm512_loadu_si512(b);
    const __m512i w1 =
        F == Form::one ? w0
        : F == Form::narrow
            ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(b + 64)))
            : _mm512_loadu_si512(b + 64);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        int32_t v;
        std::memcpy(&v, x[r] + 4 * q, 4);
        const __m512i a = _mm512_set1_epi32(v);
        // GCC 12 copies sums that an intrinsic updates.
        asm("vpdpbusd %2, %1, %0" : "+v"(c[r][0]) : "v"(a), "v"(w0));
        if (F == Form::narrow)
            asm("vpdpbusd %t2, %t1, %t0" : "+v"(c[r][1]) : "v"(a), "v"(w1));
        else if (F != Form::one)
            asm("vpdpbusd %2, %1, %0" : "+v"(c[r][1]) : "v"(a), "v"(w1));
    }
}

char *line(const ProductI8 &p, int64_t i, int r) {
    return p.out + (p.out_row ? p.out_row[r] : r) * p.row_bytes + i;
}

// 24 bytes, in the integer units, which products leave alone.
__attribute__((always_inline)) inline void turn(const char *from, char *to) {
#pragma GCC unroll 3
    for (int i = 0; i < 24; i += 8) {
        uint64_t v;
        std::memcpy(&v, from + i, 8);
        v ^= 0x8080808080808080u;
        std::memcpy(to + i, &v, 8);
    }
}

// Products of the rows from r0 on, while the sums of the rows from r1 on leave. What is at `ahead` is fetched
// into L2 meanwhile, `rate` bytes beside each step. Turn: six rows from `made` on are made of p.raw.
template <bool Even, Form F, bool Turn = false>
__attribute__((always_inline)) inline void tile(const ProductI8 &p, const Scales &e, int64_t i, Sums &c,
                                                int r0, const Sums &before, int r1, const int8_t *ahead,
                                                int64_t rate, int made) {
    const char *from = Turn ? p.raw + made * p.row_step : nullptr;
    char *to = Turn ? p.operands + made * p.row_step : nullptr;
    const int64_t width = 4 * p.width;
    const int8_t *b = p.panel + 4 * i;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        c[r][0] = e.start[0];
        c[r][1] = e.start[1];
    }
    // Beside each step. Steps ask for a line several times, which costs less than a test. Weights of several
    // taps keep L2 busy: there, fetching into L2 alone took 2 to 3 % longer on three layers.
    const auto beside = [&](int64_t q) __attribute__((always_inline)) {
        _mm_prefetch(reinterpret_cast<const char *>(ahead + (Even ? 12 : rate) * q),
                     Even ? _MM_HINT_T1 : _MM_HINT_T0);
        if (Turn)
            turn(from + 24 * q, to + 24 * q);
    };
    for (int64_t t = 0; t < (Even ? 1 : p.taps); ++t, b += p.gap, ahead += rate * p.kq) {
        const Rows<Even> x(p, t, r0);
        int64_t q = 0;
        if (t == 0)
#pragma GCC unroll 6
            for (; q < kRows; ++q) {
                if (!Even || q < p.kq) {
                    step<Even, F>(c, b, x, q);
                    b += width;
                }
                finish_row<F>(e, before[q][0], before[q][1], p.row_scale[r1 + q], line(p, i, r1 + q));
                prefetch_to_write(line(p, i, r0 + q));
                if (!Turn || q < p.kq) // six rows have 24 bytes for each step, not more
                    beside(q);
            }
        for (; q < p.kq; ++q, b += width) {
            step<Even, F>(c, b, x, q);
            beside(q);
        }
    }
}

// The first `count` rows, a multiple of kRows. Turn: all rows of p are made of p.raw on the way.
template <bool Even, Form F, bool Turn = false>
__attribute__((noinline)) void strip(const ProductI8 &p, const Scales &e, int64_t i, int count) {
    Sums a, b;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
        b[r][0] = b[r][1] = _mm512_setzero_si512();
    const auto leave = [&](const Sums &c, int r0) __attribute__((always_inline)) {
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r)
            finish_row<F>(e, c[r][0], c[r][1], p.row_scale[r0 + r], line(p, i, r0 + r));
    };
    // Beside each step a tile's share of what is fetched; of even rows, half as many bytes as they have.
    const int64_t steps = p.taps * p.kq * (count / kRows), strips = (p.cols + 31) / 32;
    const int64_t rate = !Even ? fetch_rate(p, steps * strips) : p.next == p.panel ? 0 : 12;
    const int8_t *fetched = p.next + i / 32 * steps * rate;
    const auto ahead = [&](int r) { return fetched + r / kRows * p.taps * p.kq * rate; };
    if (Turn)
        turn_top_bits(p.raw, kRows * p.row_step, p.operands);
    // The last tile makes the first rows again, of the same bytes.
    const auto after = [count](int r) { return r + kRows < count ? r + kRows : 0; };
    // The first tile finds none before it: what it writes, it writes over.
    tile<Even, F, Turn>(p, e, i, a, 0, b, 0, ahead(0), rate, after(0));
    int r = kRows;
    for (; r + kRows < count; r += 2 * kRows) {
        tile<Even, F, Turn>(p, e, i, b, r, a, r - kRows, ahead(r), rate, after(r));
        tile<Even, F, Turn>(p, e, i, a, r + kRows, b, r, ahead(r + kRows), rate, after(r + kRows));
    }
    if (r == count) {
        leave(a, r - kRows);
    } else {
        tile<Even, F, Turn>(p, e, i, b, r, a, r - kRows, ahead(r), rate, after(r));
        leave(b, r);
    }
    if (Turn)
        turn_top_bits(p.raw + count * p.row_step, (p.count - count) * p.row_step,
                      p.operands + count * p.row_step);
}

using Strip = void (*)(const ProductI8 &, const Scales &, int64_t i, int count);
template <bool Even, bool Turn = false>
constexpr Strip kStrips[4] = {strip<Even, Form::whole, Turn>, strip<Even, Form::part, Turn>,
                              strip<Even, Form::narrow, Turn>, strip<Even, Form::one, Turn>};

// False where an output may be NaN, which finish_row takes for a number.
bool scales_of(const ProductI8 &p, int64_t i, Scales &to) {
    const Epilogue &e = *p.epilogue;
    const int64_t left = p.cols - i;
    to.outputs = left >= 32 ? ~0u : (1u << left) - 1;
    for (int v = 0; v < 2; ++v) {
        const int64_t at = p.n0 + i + 16 * v;
        const __mmask16 m = static_cast<__mmask16>(to.outputs >> 16 * v);
        const __m512 w = e.w_scale ? _mm512_maskz_loadu_ps(m, e.w_scale + at) : _mm512_set1_ps(1.0f),
                     b = e.bias ? _mm512_maskz_loadu_ps(m, e.bias + at) : _mm512_setzero_ps();
        if (!finite(w) || !finite(b))
            return false;
        _mm512_store_ps(to.w[v], w);
        _mm512_store_ps(to.bias[v], b);
        to.start[v] = e.correction == 0 ? _mm512_setzero_si512()
                                        : _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(m, e.colsum + at),
                                                             _mm512_set1_epi32(e.correction));
    }
    to.inv = e.out_inv_scale;
    to.zp = e.out_zero_point;
    to.lo = static_cast<float>(e.activation == Activation::relu ? 0 : -128 - e.out_zero_point);
    to.hi = static_cast<float>(127 - e.out_zero_point);
    return true;
}

} // namespace

int product_i8_codes_avx512vnni(const ProductI8 &p) {
    const Epilogue &e = *p.epilogue;
    const int count = p.count / kRows * kRows;
    if (count == 0 || (p.kq < kRows && !p.even()) || !leaves_as_codes(e, p.row_scale, count))
        return 0;
    // With few products beside them, rows are made as fast in one go: below this 0.92 to 1.0 of its speed.
    const bool turn = p.raw && p.kq * p.cols >= 1024;
    if (p.raw && !turn)
        turn_top_bits(p.raw, p.count * p.row_step, p.operands);
    for (int64_t i = 0; i < p.cols; i += 32) {
        Scales s;
        if (!scales_of(p, i, s))
            return 0;
        const int64_t left = p.cols - i;
        const Form form = left >= 32  ? Form::whole
                          : left > 24 ? Form::part
                          : left > 16 ? Form::narrow
                                      : Form::one;
        const Strip *strips = !p.even()        ? kStrips<false>
                              : turn && i == 0 ? kStrips<true, true>
                                               : kStrips<true>;
        strips[static_cast<int>(form)](p, s, i, count);
    }
    return count;
}

} // namespace tautorch
