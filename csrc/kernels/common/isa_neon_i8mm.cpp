// NEON with matrix products of bytes (SMMLA): Neoverse V1 and N2, Cortex-A510 and X2, Apple M2 and later. Two
// rows by two outputs by eight inputs an instruction; one row alone takes SDOT.
#define TT_LANES 4
#define TT_DOT_BYTES 1
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
constexpr int kKr = 8;

int32_t mr_of(int32_t) { return 6; }

inline int8x16_t zip_low(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
inline int8x16_t zip_high(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
inline int32x4_t low_pairs(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
inline int32x4_t high_pairs(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

// P pairs of rows by NP pairs of outputs, 8 inputs.
template <int P, int NP>
inline __attribute__((always_inline)) void step(const int8_t *w, const int8x16_t *x,
                                                int32x4_t (&acc)[P][NP]) {
#pragma GCC unroll 8
    for (int v = 0; v < NP; ++v) {
        const int8x16_t wv = vld1q_s8(w + 16 * v);
#pragma GCC unroll 3
        for (int p = 0; p < P; ++p)
            acc[p][v] = vmmlaq_s32(acc[p][v], x[p], wv);
    }
}

// An odd last row is paired with itself. Tiles that leave few registers take 8 inputs at a time, and one
// instruction more for each pair of rows.
template <int MR, int NV>
void dot_i8_t(const void *const *rows, int64_t ld, int64_t taps, int64_t kq, const int8_t *b, int32_t *out) {
    constexpr int P = (MR + 1) / 2, NP = 2 * NV, kStep = 16 * NP;
    int32x4_t acc[P][NP];
    for (int p = 0; p < P; ++p)
        for (int v = 0; v < NP; ++v)
            acc[p][v] = vdupq_n_s32(0);
    for (int64_t t = 0; t < taps; ++t) {
        const int8_t *a[2 * P];
        for (int r = 0; r < 2 * P; ++r)
            a[r] = static_cast<const int8_t *>(rows[t * ld + (r < MR ? r : MR - 1)]);
        const auto eight = [&](int64_t q) __attribute__((always_inline)) {
            int8x16_t x[P];
#pragma GCC unroll 3
            for (int p = 0; p < P; ++p)
                x[p] = vcombine_s8(vld1_s8(a[2 * p] + 8 * q), vld1_s8(a[2 * p + 1] + 8 * q));
            step<P, NP>(b, x, acc);
            b += kStep;
        };
        int64_t q = 0;
        for (; P * NP <= 16 && q + 2 <= kq; q += 2, b += 2 * kStep) {
            int8x16_t x[2][P];
#pragma GCC unroll 3
            for (int p = 0; p < P; ++p) {
                const int8x16_t even = vld1q_s8(a[2 * p] + 8 * q), odd = vld1q_s8(a[2 * p + 1] + 8 * q);
                x[0][p] = zip_low(even, odd);
                x[1][p] = zip_high(even, odd);
            }
            step<P, NP>(b, x[0], acc);
            step<P, NP>(b + kStep, x[1], acc);
        }
        for (; q < kq; ++q)
            eight(q);
    }
    for (int p = 0; p < P; ++p)
        for (int v = 0; v < NV; ++v) {
            const int32x4_t l = acc[p][2 * v], h = acc[p][2 * v + 1];
            vst1q_s32(out + 2 * p * kTileN + 4 * v, low_pairs(l, h));
            if (2 * p + 1 < MR)
                vst1q_s32(out + (2 * p + 1) * kTileN + 4 * v, high_pairs(l, h));
        }
}

// One row: every load of weights meets one SDOT; lanes are halves of two outputs.
template <int NV>
void dot_i8_one(const void *const *rows, int64_t ld, int64_t taps, int64_t kq, const int8_t *b,
                int32_t *out) {
    constexpr int NP = 2 * NV, U = NV >= 4 ? 1 : NV >= 2 ? 2 : 4;
    int32x4_t acc[U][NP];
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < NP; ++v)
            acc[u][v] = vdupq_n_s32(0);
    for (int64_t t = 0; t < taps; ++t) {
        const int8_t *a = static_cast<const int8_t *>(rows[t * ld]);
        const auto add = [&](int64_t q, int32x4_t(&c)[NP]) __attribute__((always_inline)) {
            int64_t eight;
            __builtin_memcpy(&eight, a + 8 * q, 8);
            const int8x16_t x = vreinterpretq_s8_s64(vdupq_n_s64(eight));
#pragma GCC unroll 8
            for (int v = 0; v < NP; ++v)
                c[v] = vdotq_s32(c[v], vld1q_s8(b + 16 * v), x);
            b += 16 * NP;
        };
        int64_t q = 0;
        for (; q + U <= kq; q += U)
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u)
                add(q + u, acc[u]);
        for (; q < kq; ++q)
            add(q, acc[0]);
    }
    for (int v = 0; v < NV; ++v) {
        int32x4_t l = acc[0][2 * v], h = acc[0][2 * v + 1];
        for (int u = 1; u < U; ++u) {
            l = vaddq_s32(l, acc[u][2 * v]);
            h = vaddq_s32(h, acc[u][2 * v + 1]);
        }
        vst1q_s32(out + 4 * v, vpaddq_s32(l, h));
    }
}

using DotI8 = void (*)(const void *const *, int64_t, int64_t, int64_t, const int8_t *, int32_t *);
template <int NV>
constexpr DotI8 kDotI8[6] = {dot_i8_one<NV>,  dot_i8_t<2, NV>, dot_i8_t<3, NV>,
                             dot_i8_t<4, NV>, dot_i8_t<5, NV>, dot_i8_t<6, NV>};
void dot_i8(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
            int width, int32_t *acc) {
    const DotI8 *dot = width == 16 ? kDotI8<4> : width == 12 ? kDotI8<3> : width == 8 ? kDotI8<2> : kDotI8<1>;
    dot[mr - 1](rows, ld, taps, kq, panel, acc);
}

// Cells of 16 inputs by 16 outputs; rows lie in pairs of 8 inputs each, as the instruction takes them. An odd
// last row is paired with whatever follows it.
template <int MR> void cells_t(const StripI8 &s) {
    constexpr int P = (MR + 1) / 2;
    int32x4_t acc[P][8];
    for (int p = 0; p < P; ++p)
        for (int v = 0; v < 8; ++v)
            acc[p][v] = vdupq_n_s32(0);
    const int8_t *w = s.data;
    for (int64_t i = 0; i < s.steps; ++i) {
        const int8_t *at = reinterpret_cast<const int8_t *>(s.x) + int64_t{s.cell[i]} * (kCellInputs * MR);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h, w += 128) {
            int8x16_t x[P];
#pragma GCC unroll 3
            for (int p = 0; p < P; ++p)
                x[p] = vld1q_s8(at + 8 * MR * h + 16 * p);
            step<P, 8>(w, x, acc);
        }
    }
    int32_t *out = reinterpret_cast<int32_t *>(s.out);
    for (int p = 0; p < P; ++p)
        for (int v = 0; v < 4; ++v) {
            const int32x4_t l = acc[p][2 * v], h = acc[p][2 * v + 1];
            vst1q_s32(out + 32 * p + 4 * v, low_pairs(l, h));
            if (2 * p + 1 < MR)
                vst1q_s32(out + 32 * p + 16 + 4 * v, high_pairs(l, h));
        }
}
void cells_one(const StripI8 &s) {
    int32x4_t acc[8];
    for (int v = 0; v < 8; ++v)
        acc[v] = vdupq_n_s32(0);
    const int8_t *w = s.data;
    for (int64_t i = 0; i < s.steps; ++i) {
        const int8x16_t x =
            vld1q_s8(reinterpret_cast<const int8_t *>(s.x) + int64_t{s.cell[i]} * kCellInputs);
        const int8x16_t half[2] = {zip_low(x, x), zip_high(x, x)};
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h, w += 128)
#pragma GCC unroll 8
            for (int v = 0; v < 8; ++v)
                acc[v] = vdotq_s32(acc[v], vld1q_s8(w + 16 * v), half[h]);
    }
    for (int v = 0; v < 4; ++v)
        vst1q_s32(reinterpret_cast<int32_t *>(s.out) + 4 * v, vpaddq_s32(acc[2 * v], acc[2 * v + 1]));
}
void cells(const StripI8 &s) {
    constexpr void (*kCells[6])(const StripI8 &) = {cells_one,  cells_t<2>, cells_t<3>,
                                                    cells_t<4>, cells_t<5>, cells_t<6>};
    kCells[s.rows - 1](s);
}
constexpr StripKernel kStrip = {8, false, false, 6, 0, cells};

int64_t peak_i8(int64_t rounds) {
    int64_t n = rounds;
    TT_PEAK("smmla v\\r\\().4s, v30.16b, v31.16b");
    return rounds * 24 * 32;
}

constexpr int64_t kDigitRows = INT64_MAX;
constexpr int kDigitSums = 6;

} // namespace
} // namespace tautorch
#include "kernels/common/product_w8_neon.h"

namespace tautorch {

const Isa isa_neon_i8mm = {
    "neon_i8mm",  6,         ActKind::i8, 16,          4,       kKr,      mr_of,        dot_i8,
    dot_f32,      rows_f32,  amax,        quantize,    to_f32,  epilogue, transpose_u8, panel_u8,
    transpose_32, sparse_i8, sparse_f32,  kPlainOrder, peak_i8, peak_f32, depthwise,    true,
    nullptr,      nullptr,   nullptr,     nullptr,     nullptr, &kStrip,  &kDigits,     widen,
};

} // namespace tautorch
