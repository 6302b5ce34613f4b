// Few inputs, many outputs (the up factor of a low-rank layer): a tile takes all outputs of its rows before
// the next rows begin, so that it writes each row from end to end and calls nothing on the way. Tile by tile
// from panel to panel, a tile of 6 x 64 costs 80 to 100 cycles more, half of them for stores: each goes to
// a page of its own, and rows a multiple of 4 KB apart share one set of L1.
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "kernels/common/product_i8.h"

namespace tautorch {
namespace {

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }

// 6 rows: their lines stay in one set of an L1 with 8 ways, and 24 accumulators leave registers for a step.
template <int MR, bool Relu> void rows(const ProductI8 &p, int r0) {
    const Epilogue &e = *p.epilogue;
    const int64_t step = p.row_step;
    const char *x[2];
    for (int i = 0; i < 2; ++i)
        x[i] = static_cast<const char *>(p.rows[0]) + (r0 + 3 * i) * step;
    const int8_t *b = p.panel;
    char *out = p.out + r0 * p.row_bytes;
    const __m512i correction = _mm512_set1_epi32(e.correction);
    for (int64_t n = p.n0, end = p.n0 + 64 * p.panels; n < end; n += 64, out += 256) {
        __m512i c[MR][4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const __m512i from = _mm512_mullo_epi32(load(e.colsum + n + 16 * v), correction);
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r)
                c[r][v] = from;
        }
        for (int64_t q = 0; q < p.kq; ++q, b += 256) {
            __m512i w[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v)
                w[v] = load(b + 64 * v);
#pragma GCC unroll 6
            for (int r = 0; r < MR; ++r) {
                int32_t a;
                std::memcpy(&a, x[r / 3] + r % 3 * step + 4 * q, 4);
                const __m512i s = _mm512_set1_epi32(a);
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) // GCC 12 copies accumulators that an intrinsic updates
                    asm("vpdpbusd %2, %1, %0" : "+v"(c[r][v]) : "v"(s), "v"(w[v]));
            }
        }
        __m512 w[4], bias[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            w[v] = e.w_scale ? _mm512_loadu_ps(e.w_scale + n + 16 * v) : _mm512_set1_ps(1.0f);
            bias[v] = e.bias ? _mm512_loadu_ps(e.bias + n + 16 * v) : _mm512_setzero_ps();
        }
        char *to = out;
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r, to += p.row_bytes) {
            const __m512 s = _mm512_set1_ps(p.row_scale[r0 + r]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(c[r][v]), s), w[v]),
                                         bias[v]);
                if (Relu) // gives back its second operand where either is NaN: a row of NaN stays one
                    y = _mm512_max_ps(_mm512_setzero_ps(), y);
                _mm512_storeu_ps(to + 64 * v, y);
            }
        }
    }
}

using Rows = void (*)(const ProductI8 &, int);
template <bool Relu>
constexpr Rows kRows[6] = {rows<1, Relu>, rows<2, Relu>, rows<3, Relu>,
                           rows<4, Relu>, rows<5, Relu>, rows<6, Relu>};

} // namespace

void product_i8_rows_avx512vnni(const ProductI8 &p) {
    const Rows *tiles = p.epilogue->activation == Activation::relu ? kRows<true> : kRows<false>;
    const int parts = (p.count + 5) / 6;
    for (int j = 0; j < parts; ++j) {
        const int r0 = p.count * j / parts;
        tiles[p.count * (j + 1) / parts - r0 - 1](p, r0);
    }
}

} // namespace tautorch
