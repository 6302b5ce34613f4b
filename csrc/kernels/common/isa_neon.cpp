// NEON of every 64-bit Arm core, without dot products. Products of 16 bytes are made in 16 bits and added in
// pairs to 32: smull, smlal2, sadalp for 16 multiply-accumulates.
#define TT_LANES 4
#define TT_DOT_BYTES 0
#include "kernels/common/depthwise_neon.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/isa.h"
#include "kernels/common/panel.h"
#include "kernels/common/sparse_f32_kernel.h"
#include "kernels/common/sparse_neon.h"
#include "kernels/common/sparse_plain.h"

#include "kernels/common/peak_neon.h"

namespace tautorch {
namespace {

constexpr int kVectorsF32 = 4;
constexpr int kKr = 16;

int32_t mr_of(int32_t) { return 4; }

// acc + x * w, 16 inputs. Two products fit 16 bits unless both are of -128 by -128: Lowest.
template <bool Lowest>
inline __attribute__((always_inline)) int32x4_t madd(int32x4_t acc, int8x16_t x, int8x16_t w) {
    const int16x8_t p = vmull_s8(vget_low_s8(x), vget_low_s8(w));
    if constexpr (Lowest)
        return vpadalq_s16(vpadalq_s16(acc, p), vmull_high_s8(x, w));
    else
        return vpadalq_s16(acc, vmlal_high_s8(p, x, w));
}

// acc += 16 inputs of MR rows times 4 * G outputs, a register of partial sums for each.
template <bool Lowest, int MR, int N>
inline __attribute__((always_inline)) void step(const int8_t *w, const int8x16_t (&x)[MR],
                                                int32x4_t (&acc)[MR][N]) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        const int8x16_t wn = vld1q_s8(w + kKr * n);
#pragma GCC unroll 4
        for (int r = 0; r < MR; ++r)
            acc[r][n] = madd<Lowest>(acc[r][n], x[r], wn);
    }
}
template <int MR, int N> inline void clear(int32x4_t (&acc)[MR][N]) {
    for (int r = 0; r < MR; ++r)
        for (int n = 0; n < N; ++n)
            acc[r][n] = vdupq_n_s32(0);
}
template <int MR, int N> inline void write(const int32x4_t (&acc)[MR][N], int32_t *out, int64_t ld) {
    for (int r = 0; r < MR; ++r)
        for (int g = 0; g < N / 4; ++g) {
            const int32x4_t *s = acc[r] + 4 * g;
            vst1q_s32(out + r * ld + 4 * g, vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3])));
        }
}

// MR rows by 4 * G outputs. b: those outputs of the panel, whose groups of inputs are `step_bytes` apart.
template <int MR, int G, bool Lowest>
void dot_i8_t(const void *const *rows, int64_t ld, int64_t taps, int64_t kq, const int8_t *b,
              int64_t step_bytes, int32_t *out) {
    int32x4_t acc[MR][4 * G];
    clear(acc);
    for (int64_t t = 0; t < taps; ++t) {
        const int8_t *a[MR];
        for (int r = 0; r < MR; ++r)
            a[r] = static_cast<const int8_t *>(rows[t * ld + r]);
        for (int64_t q = 0; q < kq; ++q, b += step_bytes) {
            int8x16_t x[MR];
#pragma GCC unroll 4
            for (int r = 0; r < MR; ++r)
                x[r] = vld1q_s8(a[r] + kKr * q);
            step<Lowest>(b, x, acc);
        }
    }
    write(acc, out, kTileN);
}

// Whether some operand is -128, as only int8 given and static scales have it. One instruction for 16 inputs
// that meet up to 48 of the product.
bool has_lowest(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq) {
    int8x16_t least = vdupq_n_s8(0);
    for (int64_t t = 0; t < taps; ++t)
        for (int r = 0; r < mr; ++r) {
            const int8_t *x = static_cast<const int8_t *>(rows[t * ld + r]);
            for (int64_t q = 0; q < kq; ++q)
                least = vminq_s8(least, vld1q_s8(x + kKr * q));
        }
    return vminvq_s8(least) == -128;
}

using DotI8 = void (*)(const void *const *, int64_t, int64_t, int64_t, const int8_t *, int64_t, int32_t *);
template <bool Lowest>
void dot_i8_of(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
               int width, int32_t *acc) {
    // 16 sums in flight where there are so many.
    constexpr DotI8 kDotI8[2][4] = {
        {dot_i8_t<1, 1, Lowest>, dot_i8_t<2, 1, Lowest>, dot_i8_t<3, 1, Lowest>, dot_i8_t<4, 1, Lowest>},
        {dot_i8_t<1, 2, Lowest>, dot_i8_t<2, 2, Lowest>, nullptr, nullptr}};
    for (int n = 0; n < width;) {
        const int g = mr <= 2 && n + 8 <= width ? 2 : 1;
        kDotI8[g - 1][mr - 1](rows, ld, taps, kq, panel + kKr * n, int64_t{kKr} * width, acc + n);
        n += 4 * g;
    }
}
void dot_i8(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
            int width, int32_t *acc) {
    (has_lowest(rows, ld, mr, taps, kq) ? dot_i8_of<true> : dot_i8_of<false>)(rows, ld, mr, taps, kq, panel,
                                                                              width, acc);
}

// Cells of 16 inputs by 16 outputs.
template <int MR, int G, bool Lowest> void cells_t(const StripI8 &s) {
    for (int n = 0; n < 16; n += 4 * G) {
        int32x4_t acc[MR][4 * G];
        clear(acc);
        const int8_t *w = s.data + kKr * n;
        for (int64_t i = 0; i < s.steps; ++i, w += 16 * kKr) {
            const int8_t *at = reinterpret_cast<const int8_t *>(s.x) + int64_t{s.cell[i]} * (kKr * MR);
            int8x16_t x[MR];
#pragma GCC unroll 4
            for (int r = 0; r < MR; ++r)
                x[r] = vld1q_s8(at + kKr * r);
            step<Lowest>(w, x, acc);
        }
        write(acc, reinterpret_cast<int32_t *>(s.out) + n, 16);
    }
}
void cells(const StripI8 &s) {
    constexpr void (*kCells[2][4])(const StripI8 &) = {
        {cells_t<1, 2, false>, cells_t<2, 2, false>, cells_t<3, 1, false>, cells_t<4, 1, false>},
        {cells_t<1, 2, true>, cells_t<2, 2, true>, cells_t<3, 1, true>, cells_t<4, 1, true>}};
    int8x16_t least = vdupq_n_s8(0);
    for (int64_t i = 0; i < s.steps; ++i)
        for (int r = 0; r < s.rows; ++r)
            least = vminq_s8(least, vld1q_s8(reinterpret_cast<const int8_t *>(s.x) +
                                             (int64_t{s.cell[i]} * s.rows + r) * kKr));
    kCells[vminvq_s8(least) == -128][s.rows - 1](s);
}
constexpr StripKernel kStrip = {16, false, false, 4, 0, cells};

int64_t peak_i8(int64_t rounds) {
    int64_t n = rounds;
    TT_PEAK("smull v24.8h, v30.8b, v31.8b\n\tsmlal2 v24.8h, v30.16b, v31.16b\n\tsadalp v\\r\\().4s, v24.8h");
    return rounds * 24 * 16;
}

// Of more rows, floats take fewer multiplications: 16 against 24 for 64 weights.
constexpr int64_t kDigitRows = 2;
constexpr int kDigitSums = 4;

} // namespace
} // namespace tautorch
#include "kernels/common/product_w8_neon.h"

namespace tautorch {

const Isa isa_neon = {
    "neon",       4,         ActKind::i8, 16,          4,       kKr,      mr_of,        dot_i8,
    dot_f32,      rows_f32,  amax,        quantize,    to_f32,  epilogue, transpose_u8, panel_u8,
    transpose_32, sparse_i8, sparse_f32,  kPlainOrder, peak_i8, peak_f32, depthwise,    true,
    nullptr,      nullptr,   nullptr,     nullptr,     nullptr, &kStrip,  &kDigits,     widen,
};

} // namespace tautorch
