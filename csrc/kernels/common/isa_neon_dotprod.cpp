// NEON with dot products (SDOT): Cortex-A55 and A75 and later, Apple A13 and later. Four inputs of an output
// in each 32-bit lane of the weights, times four inputs of a row by element.
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
constexpr int kKr = 4;

int32_t mr_of(int32_t) { return 6; }

// acc += 4 outputs of each of NV vectors at w times inputs 4 * Lane ... of the rows.
template <int Lane, int MR, int NV>
inline __attribute__((always_inline)) void step(const int8_t *w, const int8x16_t (&x)[MR],
                                                int32x4_t (&acc)[MR][NV]) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        const int8x16_t wv = vld1q_s8(w + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r)
            acc[r][v] = vdotq_laneq_s32(acc[r][v], wv, x[r], Lane);
    }
}

// Tiles of 6 x 16 take 24 registers of sums, 6 of rows and one of weights at a time: 22 loads for 96
// products.
template <int MR, int NV>
void dot_i8_t(const void *const *rows, int64_t ld, int64_t taps, int64_t kq, const int8_t *b, int32_t *out) {
    // Narrow tiles have too few chains to hide the latency: split them over U groups of inputs.
    constexpr int U = MR * NV >= 8 ? 1 : MR * NV > 4 ? 2 : 4;
    constexpr int kStep = 16 * NV;
    int32x4_t acc[U][MR][NV];
    for (int u = 0; u < U; ++u)
        for (int r = 0; r < MR; ++r)
            for (int v = 0; v < NV; ++v)
                acc[u][r][v] = vdupq_n_s32(0);
    for (int64_t t = 0; t < taps; ++t) {
        const int8_t *a[MR];
        for (int r = 0; r < MR; ++r)
            a[r] = static_cast<const int8_t *>(rows[t * ld + r]);
        int64_t q = 0;
        for (; q + 4 <= kq; q += 4, b += 4 * kStep) {
            int8x16_t x[MR];
            for (int r = 0; r < MR; ++r)
                x[r] = vld1q_s8(a[r] + 4 * q);
            step<0>(b, x, acc[0]);
            step<1>(b + kStep, x, acc[1 % U]);
            step<2>(b + 2 * kStep, x, acc[2 % U]);
            step<3>(b + 3 * kStep, x, acc[3 % U]);
        }
        if (q < kq) { // one to three groups; nothing is made of what is read past them
            int8x16_t x[MR];
            for (int r = 0; r < MR; ++r)
                x[r] = vld1q_s8(a[r] + 4 * q);
            step<0>(b, x, acc[0]);
            if (kq - q > 1)
                step<1>(b + kStep, x, acc[1 % U]);
            if (kq - q > 2)
                step<2>(b + 2 * kStep, x, acc[2 % U]);
            b += (kq - q) * kStep;
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v) {
            int32x4_t s = acc[0][r][v];
            for (int u = 1; u < U; ++u)
                s = vaddq_s32(s, acc[u][r][v]);
            vst1q_s32(out + r * kTileN + 4 * v, s);
        }
}

using DotI8 = void (*)(const void *const *, int64_t, int64_t, int64_t, const int8_t *, int32_t *);
template <int NV>
constexpr DotI8 kDotI8[6] = {dot_i8_t<1, NV>, dot_i8_t<2, NV>, dot_i8_t<3, NV>,
                             dot_i8_t<4, NV>, dot_i8_t<5, NV>, dot_i8_t<6, NV>};
void dot_i8(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
            int width, int32_t *acc) {
    const DotI8 *dot = width == 16 ? kDotI8<4> : width == 12 ? kDotI8<3> : width == 8 ? kDotI8<2> : kDotI8<1>;
    dot[mr - 1](rows, ld, taps, kq, panel, acc);
}

// Cells of 16 inputs by 16 outputs: a turn of the dense loop wherever the inputs are.
template <int MR> void cells_t(const StripI8 &s) {
    constexpr int U = MR == 1 ? 4 : 1;
    int32x4_t acc[U][MR][4];
    for (int u = 0; u < U; ++u)
        for (int r = 0; r < MR; ++r)
            for (int v = 0; v < 4; ++v)
                acc[u][r][v] = vdupq_n_s32(0);
    const int8_t *w = s.data;
    for (int64_t i = 0; i < s.steps; ++i, w += 256) {
        const int8_t *at = reinterpret_cast<const int8_t *>(s.x) + int64_t{s.cell[i]} * (kCellInputs * MR);
        int8x16_t x[MR];
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r)
            x[r] = vld1q_s8(at + kCellInputs * r);
        step<0>(w, x, acc[0]);
        step<1>(w + 64, x, acc[1 % U]);
        step<2>(w + 128, x, acc[2 % U]);
        step<3>(w + 192, x, acc[3 % U]);
    }
    int32_t *out = reinterpret_cast<int32_t *>(s.out);
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < 4; ++v) {
            int32x4_t sum = acc[0][r][v];
            for (int u = 1; u < U; ++u)
                sum = vaddq_s32(sum, acc[u][r][v]);
            vst1q_s32(out + 16 * r + 4 * v, sum);
        }
}
void cells(const StripI8 &s) {
    constexpr void (*kCells[6])(const StripI8 &) = {cells_t<1>, cells_t<2>, cells_t<3>,
                                                    cells_t<4>, cells_t<5>, cells_t<6>};
    kCells[s.rows - 1](s);
}
constexpr StripKernel kStrip = {16, false, false, 6, 0, cells};

int64_t peak_i8(int64_t rounds) {
    int64_t n = rounds;
    TT_PEAK("sdot v\\r\\().4s, v30.16b, v31.4b[0]");
    return rounds * 24 * 16;
}

constexpr int64_t kDigitRows = INT64_MAX;
constexpr int kDigitSums = 6;

} // namespace
} // namespace tautorch
#include "kernels/common/product_w8_neon.h"

namespace tautorch {

const Isa isa_neon_dotprod = {
    "neon_dotprod", 5,         ActKind::i8, 16,          4,       kKr,      mr_of,        dot_i8,
    dot_f32,        rows_f32,  amax,        quantize,    to_f32,  epilogue, transpose_u8, panel_u8,
    transpose_32,   sparse_i8, sparse_f32,  kPlainOrder, peak_i8, peak_f32, depthwise,    true,
    nullptr,        nullptr,   nullptr,     nullptr,     nullptr, &kStrip,  &kDigits,     widen,
};

} // namespace tautorch
