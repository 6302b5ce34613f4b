// Sparse int8 on NEON; see isa.h for the contract. Lanes are rows of x. The including file defines
// TT_DOT_BYTES: 1 where there is SDOT, which takes four inputs of a row at once; otherwise inputs are widened
// to 16 bits and multiplied by element, exact for every weight.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

inline int8x16_t row16(const int8_t *x, const uint16_t *i, int w) { return vld1q_s8(x + i[0] * w / 8); }
inline int8x16_t row4(const int8_t *x, const uint16_t *i, int w) {
    int32_t four;
    std::memcpy(&four, x + i[0] * w / 8, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

#if TT_DOT_BYTES
// NV vectors of 4 rows, a row's four inputs side by side.
template <int NV> struct Quad {
    int8x16_t v[NV];
};
template <int NV> inline Quad<NV> quad_of(const int8_t *x, const uint16_t *i, int w) {
    Quad<NV> q;
    if constexpr (NV == 1) { // 4 rows: [input][row] to [row][input]
        constexpr uint8_t kTurn[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
        int32x4_t t = vreinterpretq_s32_s8(row4(x, i, w));
        t = vld1q_lane_s32(reinterpret_cast<const int32_t *>(x + i[1] * w / 8), t, 1);
        t = vld1q_lane_s32(reinterpret_cast<const int32_t *>(x + i[2] * w / 8), t, 2);
        t = vld1q_lane_s32(reinterpret_cast<const int32_t *>(x + i[3] * w / 8), t, 3);
        q.v[0] = vqtbl1q_s8(vreinterpretq_s8_s32(t), vld1q_u8(kTurn));
    } else {
#pragma GCC unroll 2
        for (int h = 0; h < NV; h += 4) {
            const int8x16_t a = row16(x + 4 * h, i, w), b = row16(x + 4 * h, i + 1, w);
            const int8x16_t c = row16(x + 4 * h, i + 2, w), d = row16(x + 4 * h, i + 3, w);
            interleave4(a, b, c, d, q.v + h);
        }
    }
    return q;
}

template <int Lane, int NV>
inline __attribute__((always_inline)) void add_lane(const Quad<NV> &q, int8x16_t w, int32x4_t (&c)[NV]) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v)
        c[v] = vdotq_laneq_s32(c[v], q.v[v], w, Lane);
}

// One group's sums of 4 * NV rows.
template <int GS, int W, int NV>
inline void add_group(const int8_t *x, const uint16_t *idx, const int8_t *values, int64_t quads,
                      int32x4_t (&c)[GS][NV]) {
    if constexpr (GS == 4) {
        for (; quads > 0; --quads, idx += 4, values += 16) {
            const Quad<NV> q = quad_of<NV>(x, idx, W);
            const int8x16_t w = vld1q_s8(values);
            add_lane<0>(q, w, c[0]);
            add_lane<1>(q, w, c[1]);
            add_lane<2>(q, w, c[2]);
            add_lane<3>(q, w, c[3]);
        }
    } else {
        for (; quads >= 4; quads -= 4, idx += 16, values += 16) {
            const int8x16_t w = vld1q_s8(values);
            add_lane<0>(quad_of<NV>(x, idx, W), w, c[0]);
            add_lane<1>(quad_of<NV>(x, idx + 4, W), w, c[0]);
            add_lane<2>(quad_of<NV>(x, idx + 8, W), w, c[0]);
            add_lane<3>(quad_of<NV>(x, idx + 12, W), w, c[0]);
        }
        for (; quads > 0; --quads, idx += 4, values += 4) {
            int32_t four;
            std::memcpy(&four, values, 4);
            add_lane<0>(quad_of<NV>(x, idx, W), vreinterpretq_s8_s32(vdupq_n_s32(four)), c[0]);
        }
    }
}
#else
// Adds weight `Lane` of w times one input of 4 * NV rows.
template <int Lane, int NV>
inline __attribute__((always_inline)) void add_input(const int16x8_t *x, int16x8_t w, int32x4_t (&c)[NV]) {
    c[0] = vmlal_laneq_s16(c[0], vget_low_s16(x[0]), w, Lane);
#pragma GCC unroll 4
    for (int v = 1; v < NV; ++v)
        c[v] = v % 2 ? vmlal_high_laneq_s16(c[v], x[v / 2], w, Lane)
                     : vmlal_laneq_s16(c[v], vget_low_s16(x[v / 2]), w, Lane);
}

template <int J, int GS, int NV>
inline __attribute__((always_inline)) void add_row(const int8x16_t row, const int16x8_t *w,
                                                   int32x4_t (&c)[GS][NV]) {
    const int16x8_t x[2] = {vmovl_s8(vget_low_s8(row)), vmovl_high_s8(row)};
    add_input<J>(x, w[0], c[0]);
    if constexpr (GS == 4) {
        add_input<4 + J>(x, w[0], c[1]);
        add_input<J>(x, w[1], c[2]);
        add_input<4 + J>(x, w[1], c[3]);
    }
}

template <int GS, int W, int NV>
inline void add_group(const int8_t *x, const uint16_t *idx, const int8_t *values, int64_t quads,
                      int32x4_t (&c)[GS][NV]) {
    const auto row = NV == 1 ? row4 : row16;
    for (; quads > 0; --quads, idx += 4, values += 4 * GS) {
        int16x8_t w[2];
        if constexpr (GS == 4) {
            const int8x16_t all = vld1q_s8(values);
            w[0] = vmovl_s8(vget_low_s8(all));
            w[1] = vmovl_high_s8(all);
        } else {
            int32_t four;
            std::memcpy(&four, values, 4);
            w[0] = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
        }
        add_row<0>(row(x, idx, W), w, c);
        add_row<1>(row(x, idx + 1, W), w, c);
        add_row<2>(row(x, idx + 2, W), w, c);
        add_row<3>(row(x, idx + 3, W), w, c);
    }
}
#endif

// 4 * NV rows of W at a time: sums are 16 registers for groups of 4, at most 8 for single outputs.
template <int GS, int W, int NV>
void sparse_i8_t(const int8_t *x, const uint32_t *start, const uint16_t *idx, const int8_t *values,
                 int64_t g0, int64_t g1, bool add, int32_t *acc) {
    for (int64_t g = g0; g < g1; ++g, acc += GS * W)
        for (int first = 0; first < W; first += 4 * NV) {
            int32x4_t c[GS][NV];
            for (int r = 0; r < GS; ++r)
                for (int v = 0; v < NV; ++v)
                    c[r][v] = add ? vld1q_s32(acc + r * W + first + 4 * v) : vdupq_n_s32(0);
            const int64_t q = start[g];
            add_group<GS, W, NV>(x + first, idx + 4 * q, values + 4 * GS * q, int64_t{start[g + 1]} - q, c);
            for (int r = 0; r < GS; ++r)
                for (int v = 0; v < NV; ++v)
                    vst1q_s32(acc + r * W + first + 4 * v, c[r][v]);
        }
}

void sparse_i8(int gs, int w, const uint8_t *bytes, const uint32_t *start, const uint16_t *idx,
               const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc) {
    constexpr int kWide = TT_DOT_BYTES ? 8 : 4; // vectors of rows, single outputs
    const int8_t *x = reinterpret_cast<const int8_t *>(bytes);
    const auto run = w == 64   ? gs == 4 ? sparse_i8_t<4, 64, 4> : sparse_i8_t<1, 64, kWide>
                     : w == 16 ? gs == 4 ? sparse_i8_t<4, 16, 4> : sparse_i8_t<1, 16, 4>
                     : gs == 4 ? sparse_i8_t<4, 4, 1>
                               : sparse_i8_t<1, 4, 1>;
    run(x, start, idx, values, g0, g1, add, acc);
}

} // namespace
} // namespace tautorch
