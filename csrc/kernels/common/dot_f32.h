// Products of float rows by panels of float or int8 weights. The including file defines TT_LANES and
// kVectorsF32, the vectors of a whole panel; TT_WIDENED where its table has `widen`.
#pragma once

#include "kernels/common/isa.h"
#include "kernels/common/simd.h"

namespace tautorch {
namespace {

// GCC 12 turns a conversion of the vector extension from bytes to floats into scalar code.
inline vf load_i8(const void *p) {
#if TT_LANES == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p))));
#elif TT_LANES == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i *>(p))));
#else
    return __builtin_convertvector(__builtin_convertvector(load<vs8>(p), vi), vf);
#endif
}

#if defined(__aarch64__)
// acc += w * x[Lane] for all rows and vectors of one input.
template <int Lane, int MR, int NV, bool I8>
__attribute__((always_inline)) inline void add_input(const float32x4_t (&x)[MR], const char *panel,
                                                     vf (&acc)[MR][NV]) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        const vf w = I8 ? load_i8(panel + v * L) : load<vf>(panel + v * L * 4);
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r)
            acc[r][v] = (vf)vfmaq_laneq_f32((float32x4_t)acc[r][v], (float32x4_t)w, x[r], Lane);
    }
}
#endif

// Every loop over accumulators is unrolled: one that is not puts all of them into memory.
template <int MR, int NV, bool I8>
__attribute__((always_inline)) inline void add_products(const char *const (&x)[MR], int64_t k,
                                                        const char *panel, vf (&acc)[MR][NV]) {
    constexpr int kSize = I8 ? 1 : 4;
    int64_t i = 0;
#if defined(__aarch64__)
    // Four inputs of a row in one register, multiplied by element: broadcasting each costs a load, and on
    // most cores a vector slot, more.
    for (; i + 4 <= k; i += 4, panel += 4 * NV * L * kSize) {
        float32x4_t s[MR];
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r)
            s[r] = load<float32x4_t>(x[r] + 4 * i);
        add_input<0, MR, NV, I8>(s, panel, acc);
        add_input<1, MR, NV, I8>(s, panel + NV * L * kSize, acc);
        add_input<2, MR, NV, I8>(s, panel + 2 * NV * L * kSize, acc);
        add_input<3, MR, NV, I8>(s, panel + 3 * NV * L * kSize, acc);
    }
#endif
    for (; i < k; ++i, panel += NV * L * kSize) {
        vf w[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            if constexpr (I8)
                w[v] = load_i8(panel + v * L);
            else
                w[v] = load<vf>(panel + v * L * kSize);
        }
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r) {
            const vf s = splat(load<float>(x[r] + 4 * i));
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                acc[r][v] = fma(s, w[v], acc[r][v]);
        }
    }
}

template <int MR, int NV, bool I8>
void dot_f32_t(const void *const *rows, int64_t ld, int64_t skip, int64_t taps, int64_t k, const void *panel,
               bool add, float *out) {
    vf acc[MR][NV];
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            acc[r][v] = add ? load<vf>(out + r * kTileN + v * L) : vf{};
    const char *w = static_cast<const char *>(panel);
    for (int64_t t = 0; t < taps; ++t, w += k * NV * L * (I8 ? 1 : 4)) {
        const char *x[MR];
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r)
            x[r] = static_cast<const char *>(rows[t * ld + r]) + 4 * skip;
        add_products<MR, NV, I8>(x, k, w, acc);
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            store(out + r * kTileN + v * L, acc[r][v]);
}

using DotF32 = void (*)(const void *const *, int64_t, int64_t, int64_t, int64_t, const void *, bool, float *);
template <int MR, int NV, bool I8> constexpr DotF32 dot_f32_if_fits() {
    if constexpr (MR * NV <= 24) // registers; mr() asks for no more
        return dot_f32_t<MR, NV, I8>;
    else
        return nullptr;
}
template <int NV, bool I8>
constexpr DotF32 kDotF32[12] = {
    dot_f32_if_fits<1, NV, I8>(),  dot_f32_if_fits<2, NV, I8>(),  dot_f32_if_fits<3, NV, I8>(),
    dot_f32_if_fits<4, NV, I8>(),  dot_f32_if_fits<5, NV, I8>(),  dot_f32_if_fits<6, NV, I8>(),
    dot_f32_if_fits<7, NV, I8>(),  dot_f32_if_fits<8, NV, I8>(),  dot_f32_if_fits<9, NV, I8>(),
    dot_f32_if_fits<10, NV, I8>(), dot_f32_if_fits<11, NV, I8>(), dot_f32_if_fits<12, NV, I8>()};
template <bool I8> DotF32 dot_f32_of(int mr, int vectors) {
    switch (vectors) {
    case 1:
        return kDotF32<1, I8>[mr - 1];
    case 2:
        return kDotF32<2, I8>[mr - 1];
    case 3:
        return kDotF32<3, I8>[mr - 1];
    default:
        return kDotF32<4, I8>[mr - 1];
    }
}

void dot_f32(const void *const *rows, int64_t ld, int mr, int64_t skip, int64_t taps, int64_t k,
             const void *panel, bool weight_i8, int width, bool add, float *acc) {
#if defined(TT_WIDENED)
    (void)weight_i8;
    const DotF32 dot = dot_f32_of<false>(mr, width / L);
#else
    const DotF32 dot = weight_i8 ? dot_f32_of<true>(mr, width / L) : dot_f32_of<false>(mr, width / L);
#endif
    dot(rows, ld, skip, taps, k, panel, add, acc);
}

// Whole panels of NV vectors, all of them before the next rows begin (see product_i8_rows_avx512vnni.cpp).
template <int MR, int NV, bool Relu> void rows_f32_t(const RowsF32 &p, int r0) {
    const Epilogue &e = *p.epilogue;
    const char *x[MR];
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
        x[r] = p.x + (r0 + r) * p.x_step;
    const char *panel = reinterpret_cast<const char *>(p.panels);
    char *out = p.out + r0 * p.row_bytes;
    for (int64_t n = p.n0, end = p.n0 + p.count * NV * L; n < end;
         n += NV * L, out += 4 * NV * L, panel += 4 * NV * L * p.k) {
        vf acc[MR][NV];
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                acc[r][v] = vf{};
        add_products<MR, NV, false>(x, p.k, panel, acc);
        vf b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
            b[v] = e.bias ? load<vf>(e.bias + n + v * L) : vf{};
        char *to = out;
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r, to += p.row_bytes)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const vf y = acc[r][v] + b[v];
                store(to + 4 * v * L, Relu ? activate<Activation::relu>(y) : y);
            }
    }
}

template <int NV, bool Relu>
constexpr void (*kRowsOf[6])(const RowsF32 &, int) = {rows_f32_t<1, NV, Relu>, rows_f32_t<2, NV, Relu>,
                                                      rows_f32_t<3, NV, Relu>, rows_f32_t<4, NV, Relu>,
                                                      rows_f32_t<5, NV, Relu>, rows_f32_t<6, NV, Relu>};

void rows_f32(const RowsF32 &p) {
    const auto *tiles =
        p.epilogue->activation == Activation::relu ? kRowsOf<kVectorsF32, true> : kRowsOf<kVectorsF32, false>;
    const int parts = (p.rows + 5) / 6;
    for (int j = 0; j < parts; ++j) {
        const int r0 = p.rows * j / parts;
        tiles[p.rows * (j + 1) / parts - r0 - 1](p, r0);
    }
}

} // namespace
} // namespace tautorch
