// AVX-512 with VNNI (no VBMI: Cascade Lake has none). vpdpbusd multiplies unsigned by signed bytes, so
// activations are q + 128 and the epilogue takes 128 * colsum away.
#define TT_LANES 16
#include "kernels/common/depthwise_planes.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/isa.h"
#include "kernels/common/panel.h"
#include "kernels/common/product_planes.h"
#include "kernels/common/sparse_avx512vnni.h"
#include "kernels/common/sparse_f32_kernel.h"
#include "kernels/common/window_planes.h"

namespace tautorch {
namespace {
constexpr int kVectorsF32 = 4;
inline __m256i depthwise_madd(__m256i acc, __m256i x, __m256i w) { return _mm256_dpbusd_epi32(acc, x, w); }
} // namespace
} // namespace tautorch
#define TT_DEPTHWISE_512
#include "kernels/common/depthwise_vnni.h"
#include "kernels/common/dot_f32.h"

namespace tautorch {
namespace {

// Rows of a tile by panel width: 24 accumulators or fewer. Two vpdpbusd a cycle at a latency of 4 to 5 need
// 10 in flight.
int32_t mr_of(int32_t width) { return width == 64 ? 6 : width == 48 ? 8 : 12; }

inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }
inline __m512i broadcast4(const void *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

template <int MR, int NV>
void dot_i8_t(const void *const *rows, int64_t ld, int64_t taps, int64_t kq, const int8_t *b, int32_t *out) {
    // Narrow tiles have too few chains to hide the latency: split them over U groups of inputs.
    constexpr int U = MR * NV >= 8 ? 1 : MR * NV >= 4 ? 2 : 4;
    __m512i acc[U][MR][NV];
    for (int u = 0; u < U; ++u)
        for (int r = 0; r < MR; ++r)
            for (int v = 0; v < NV; ++v)
                acc[u][r][v] = _mm512_setzero_si512();
    for (int64_t t = 0; t < taps; ++t) {
        const uint8_t *a[MR];
        for (int r = 0; r < MR; ++r)
            a[r] = static_cast<const uint8_t *>(rows[t * ld + r]);
        int64_t q = 0;
        const auto step = [&](int64_t at, __m512i(&c)[MR][NV]) __attribute__((always_inline)) {
            __m512i w[NV];
            for (int v = 0; v < NV; ++v)
                w[v] = load512(b + 64 * v);
            b += 64 * NV;
#pragma GCC unroll 12
            for (int r = 0; r < MR; ++r) {
                const __m512i x = broadcast4(a[r] + 4 * at);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    c[r][v] = _mm512_dpbusd_epi32(c[r][v], x, w[v]);
            }
        };
        for (; q + U <= kq; q += U)
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u)
                step(q + u, acc[u]);
        for (; q < kq; ++q)
            step(q, acc[0]);
    }
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v) {
            __m512i s = acc[0][r][v];
            for (int u = 1; u < U; ++u)
                s = _mm512_add_epi32(s, acc[u][r][v]);
            _mm512_storeu_si512(out + r * kTileN + 16 * v, s);
        }
}

using DotI8 = void (*)(const void *const *, int64_t, int64_t, int64_t, const int8_t *, int32_t *);

// [vectors of the panel - 1][rows - 1]
constexpr DotI8 kDotI8[4][12] = {
    {dot_i8_t<1, 1>, dot_i8_t<2, 1>, dot_i8_t<3, 1>, dot_i8_t<4, 1>, dot_i8_t<5, 1>, dot_i8_t<6, 1>,
     dot_i8_t<7, 1>, dot_i8_t<8, 1>, dot_i8_t<9, 1>, dot_i8_t<10, 1>, dot_i8_t<11, 1>, dot_i8_t<12, 1>},
    {dot_i8_t<1, 2>, dot_i8_t<2, 2>, dot_i8_t<3, 2>, dot_i8_t<4, 2>, dot_i8_t<5, 2>, dot_i8_t<6, 2>,
     dot_i8_t<7, 2>, dot_i8_t<8, 2>, dot_i8_t<9, 2>, dot_i8_t<10, 2>, dot_i8_t<11, 2>, dot_i8_t<12, 2>},
    {dot_i8_t<1, 3>, dot_i8_t<2, 3>, dot_i8_t<3, 3>, dot_i8_t<4, 3>, dot_i8_t<5, 3>, dot_i8_t<6, 3>,
     dot_i8_t<7, 3>, dot_i8_t<8, 3>},
    {dot_i8_t<1, 4>, dot_i8_t<2, 4>, dot_i8_t<3, 4>, dot_i8_t<4, 4>, dot_i8_t<5, 4>, dot_i8_t<6, 4>},
};
void dot_i8(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
            int width, int32_t *acc) {
    kDotI8[width / 16 - 1][mr - 1](rows, ld, taps, kq, panel, acc);
}
// Everything starts at zero: what a register held before could be subnormal, which is slow.
#define TT_PEAK(step)                                                                                        \
    asm volatile("vpxorq %%zmm30, %%zmm30, %%zmm30\n\tvpxorq %%zmm31, %%zmm31, %%zmm31\n\t"                  \
                 ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n\t"                  \
                 "vpxorq %%zmm\\r, %%zmm\\r, %%zmm\\r\n\t.endr\n1:\n\t"                                      \
                 ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n\t" step             \
                 " %%zmm30, %%zmm31, %%zmm\\r\n\t.endr\n\tdec %0\n\tjnz 1b"                                  \
                 : "+r"(n)                                                                                   \
                 :                                                                                           \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",     \
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", \
                   "xmm20", "xmm21", "xmm22", "xmm23", "xmm30", "xmm31")
int64_t peak_i8(int64_t rounds) {
    int64_t n = rounds;
    TT_PEAK("vpdpbusd");
    return rounds * 24 * 64;
}
int64_t peak_f32(int64_t rounds) {
    int64_t n = rounds;
    TT_PEAK("vfmadd231ps");
    return rounds * 24 * 16;
}

} // namespace

const Isa isa_avx512vnni = {
    "avx512vnni",
    3,
    ActKind::u8_shifted,
    64,
    16,
    4,
    mr_of,
    dot_i8,
    dot_f32,
    rows_f32,
    amax,
    quantize,
    to_f32,
    epilogue,
    transpose_u8,
    panel_u8,
    transpose_32,
    sparse_i8_avx512vnni,
    sparse_f32,
    kSparseOrderAvx512.at,
    peak_i8,
    peak_f32,
    depthwise,
    false,
    product_i8_avx512vnni,
    sparse_i8_scaled_avx512vnni,
    sparse_rows_avx512vnni,
    sparse_i8_codes_avx512vnni,
    grouped_i8_avx512vnni,
    &strip_avx512vnni,
    &digits_avx512vnni,
    nullptr,
    quantize_quads,
    quantize_panel,
    product_planes_avx512vnni,
    words_of_runs_avx512vnni,
    depthwise_planes_avx512vnni,
};

} // namespace tautorch
