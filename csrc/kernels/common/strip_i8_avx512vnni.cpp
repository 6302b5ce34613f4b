// Strips of sparse int8 weights, on AVX-512 with VNNI: blocks of whole vectors, and 2:4.
//
// The rows lie interleaved by 16 bytes, so that a step's bytes are a few adjacent cache lines wherever its
// inputs are, and all their addresses are constants from one register.
#include "kernels/common/finish_avx512vnni.h"
#include "kernels/common/strip_i8.h"

namespace tautorch {
namespace {

// In assembly, because GCC 12 copies accumulators around at every turn of the loop.
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

inline __m512i broadcast4(const uint8_t *p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

inline __m512i broadcast8(const uint8_t *p) {
    long long v;
    std::memcpy(&v, p, 8);
    return _mm512_set1_epi64(v);
}

inline __m512i load512(const int8_t *p) { return _mm512_loadu_si512(p); }

// Sums of a tile in U sets, which hide the latency of few products; step(i, c) adds to them.
template <int MR, int NV, class Step>
__attribute__((always_inline)) inline void tile(const StripI8 &s, const Step &step) {
    constexpr int U = MR * NV >= 10 ? 1 : MR * NV >= 5 ? 2 : 4;
    __m512i c[U][MR][NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
        const __m512i from = start(s, 16 * v);
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
            for (int r = 0; r < MR; ++r)
                c[u][r][v] = u == 0 ? from : _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < s.steps; ++i)
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q)
            step(i, q, c[q % U]);
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u)
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v)
                c[0][r][v] = _mm512_add_epi32(c[0][r][v], c[u][r][v]);
    finish<MR, NV>(s, 0, 0, c[0]);
}

// Cells: four quads of inputs, all of whose weights are kept.
template <int MR, int NV> void cells(const StripI8 &s) {
    tile<MR, NV>(s, [&](int64_t i, int q, __m512i(&c)[MR][NV]) __attribute__((always_inline)) {
        const uint8_t *x = s.x + int64_t{s.cell[i]} * (kCellInputs * MR) + 4 * q;
        const int8_t *w = s.data + i * (256 * NV) + 64 * NV * q;
        __m512i b[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            b[v] = load512(w + 64 * v);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            const __m512i a = broadcast4(x + kCellInputs * r);
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v)
                dot(c[r][v], a, b[v]);
        }
    });
}

// 2:4: four octets of inputs. Two bits of place for each kept weight make the control of a vpshufb that takes
// the four kept bytes of an octet of x, another four for each output. A shuffle and a product for 128
// weights: the dense kernel needs two products.
template <int MR> void pairs(const StripI8 &s) {
    constexpr int NV = kPairOutputs / 16;
    const __m512i places = _mm512_set1_epi8(3), second = _mm512_set1_epi32(0x04040000);
    tile<MR, NV>(s, [&](int64_t i, int q, __m512i(&c)[MR][NV]) __attribute__((always_inline)) {
        const uint8_t *x = s.x + (2 * i + q / 2) * (kCellInputs * MR) + 8 * (q % 2);
        const int8_t *w = s.data + i * (320 * NV);
        __m512i b[NV], take[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
            b[v] = load512(w + 64 * (NV + NV * q + v));
            const __m512i bits = _mm512_srli_epi32(load512(w + 64 * v), static_cast<unsigned>(2 * q));
            take[v] = _mm512_ternarylogic_epi32(bits, places, second, 0xea); // (bits & places) | second
        }
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            const __m512i a = broadcast8(x + kCellInputs * r);
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v)
                dot(c[r][v], _mm512_shuffle_epi8(a, take[v]), b[v]);
        }
    });
}

using Run = void (*)(const StripI8 &);
constexpr Run kCells16[16] = {cells<1, 1>,  cells<2, 1>,  cells<3, 1>,  cells<4, 1>,
                              cells<5, 1>,  cells<6, 1>,  cells<7, 1>,  cells<8, 1>,
                              cells<9, 1>,  cells<10, 1>, cells<11, 1>, cells<12, 1>,
                              cells<13, 1>, cells<14, 1>, cells<15, 1>, cells<16, 1>};
constexpr Run kCells32[12] = {cells<1, 2>, cells<2, 2>,  cells<3, 2>,  cells<4, 2>,
                              cells<5, 2>, cells<6, 2>,  cells<7, 2>,  cells<8, 2>,
                              cells<9, 2>, cells<10, 2>, cells<11, 2>, cells<12, 2>};
constexpr Run kPairs[12] = {pairs<1>, pairs<2>, pairs<3>, pairs<4>,  pairs<5>,  pairs<6>,
                            pairs<7>, pairs<8>, pairs<9>, pairs<10>, pairs<11>, pairs<12>};

void run(const StripI8 &s) { (!s.cell ? kPairs : s.outputs == 32 ? kCells32 : kCells16)[s.rows - 1](s); }

} // namespace

const StripKernel strip_avx512vnni = {16, true, true, 16, 12, run};

} // namespace tautorch
