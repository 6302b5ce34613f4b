// Dense int8 panels times pixels that lie beside each other (NCHW): the roles of product_i8 turned round, so
// that neither the image nor the sums are.
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "kernels/common/finish_avx512vnni.h"
#include "kernels/common/product_planes.h"

namespace tautorch {
namespace {

// Two products a cycle (one on Zen 4) at a latency of 4 to 5 cycles: 12 outputs by 2 vectors of pixels read
// half of what 6 by 4 do of an image that is not in L1.
constexpr int kMostOutputs = 12;

template <int MR, int NV> void tile(const ProductPlanes &p, int n0, int at) {
    __m512i c[MR][NV];
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            c[r][v] = _mm512_setzero_si512();
    // The lines that will be written lie far apart, and no other hand fetches them.
    const char *line = p.line + n0 * p.line_step + 16 * at * p.size;
    const int left = p.pixels - 16 * at, last = (left < 16 * NV ? left : 16 * NV) * p.size - 1;
    for (int r = 0; r < MR; ++r, line += p.line_step)
        for (int i = 0; i <= last; i += 64)
            prefetch_to_write(line + i);
    const uint32_t *x = p.words + 16 * at;
    const int8_t *w = p.panel + 4 * n0;
    const int64_t step = 4 * p.width;
    for (int64_t q = 0; q < p.kq; ++q, x += kPlanePixels, w += step) {
        __m512i pixels[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            pixels[v] = _mm512_load_si512(x + 16 * v);
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r) {
            int32_t four;
            std::memcpy(&four, w + 4 * r, 4);
            const __m512i weights = _mm512_set1_epi32(four);
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) // GCC 12 copies accumulators that an intrinsic updates
                asm("vpdpbusd %2, %1, %0" : "+v"(c[r][v]) : "v"(pixels[v]), "v"(weights));
        }
    }
    int32_t *sums = p.sums + n0 * kPlanePixels + 16 * at;
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            _mm512_store_si512(sums + r * kPlanePixels + 16 * v, c[r][v]);
}

using Tile = void (*)(const ProductPlanes &, int, int);
template <int NV>
constexpr Tile kTiles[kMostOutputs] = {tile<1, NV>, tile<2, NV>,  tile<3, NV>,  tile<4, NV>,
                                       tile<5, NV>, tile<6, NV>,  tile<7, NV>,  tile<8, NV>,
                                       tile<9, NV>, tile<10, NV>, tile<11, NV>, tile<12, NV>};

} // namespace

void product_planes_avx512vnni(const ProductPlanes &p) {
    const int parts = (p.cols + kMostOutputs - 1) / kMostOutputs, vectors = (p.pixels + 15) / 16;
    for (int v = 0; v < vectors; v += 2)
        for (int i = 0; i < parts; ++i) {
            const int n0 = p.cols * i / parts, count = p.cols * (i + 1) / parts - n0;
            (vectors - v > 1 ? kTiles<2> : kTiles<1>)[count - 1](p, n0, v);
        }
}

} // namespace tautorch
