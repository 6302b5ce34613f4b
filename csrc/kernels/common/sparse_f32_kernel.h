// The inner loop of sparse_f32, for the instruction set of the including file (see simd.h): a block of
// entries over its part of a panel, accumulators in memory.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

template <int N> struct Floats {
    typedef float type __attribute__((vector_size(4 * N)));
};
template <int N>
inline typename Floats<N>::type multiply_add(typename Floats<N>::type a, float b,
                                             typename Floats<N>::type c) {
#if defined(__AVX512F__)
    if constexpr (N == 16)
        return (typename Floats<N>::type)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#endif
#if defined(__FMA__)
    if constexpr (N == 8)
        return (typename Floats<N>::type)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
    if constexpr (N == 4)
        return (typename Floats<N>::type)_mm_fmadd_ps((__m128)a, _mm_set1_ps(b), (__m128)c);
#endif
#if defined(__aarch64__)
    return (typename Floats<N>::type)vfmaq_n_f32((float32x4_t)c, (float32x4_t)a, b);
#else
    return a * b + c;
#endif
}

// Rows are taken NV vectors of N at a time; GS outputs share each load of x.
template <int GS, int W, int N, int NV, class Index>
void sparse_f32_t(const float *x, const uint16_t *segments, int count, const void *index, const float *values,
                  float *acc) {
    using V = typename Floats<N>::type;
    constexpr int kShift = GS == 1 ? 7 : 5;
    // A product takes 4 cycles and two start in each: 8 chains would do. How many an output has is the same
    // for every width: a row's sum must not depend on how many rows there are.
    constexpr int kChains = GS == 1 ? 4 : L == 16 ? 2 : 1;
    for (int first = 0; first < W; first += N * NV) {
        const Index *k = static_cast<const Index *>(index);
        const float *w = values;
        for (int s = 0; s < count; ++s) {
            const int n = segments[s] >> kShift;
            if (n == 0)
                continue;
            float *out = acc + (segments[s] & ((1 << kShift) - 1)) * GS * W + first;
            V c[kChains][GS][NV];
            for (int r = 0; r < GS; ++r)
                for (int v = 0; v < NV; ++v) {
                    c[0][r][v] = load<V>(out + r * W + v * N);
                    for (int u = 1; u < kChains; ++u)
                        c[u][r][v] = V{};
                }
            const auto step = [&](int e, V(&to)[GS][NV]) __attribute__((always_inline)) {
                const float *from = x + int64_t{k[e]} * W + first;
#pragma GCC unroll 4
                for (int r = 0; r < GS; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v)
                        to[r][v] = multiply_add<N>(load<V>(from + v * N), w[e * GS + r], to[r][v]);
            };
            int e = 0;
            for (; e + kChains <= n; e += kChains)
#pragma GCC unroll 4
                for (int u = 0; u < kChains; ++u)
                    step(e + u, c[u]);
            for (; e < n; ++e)
                step(e, c[0]);
            for (int r = 0; r < GS; ++r)
                for (int v = 0; v < NV; ++v) {
                    V sum = c[0][r][v];
                    for (int u = 1; u < kChains; ++u)
                        sum += c[u][r][v];
                    store(out + r * W + v * N, sum);
                }
            k += n;
            w += n * GS;
        }
    }
}

template <int GS, class Index>
void sparse_f32_of(int w, const float *x, const uint16_t *segments, int count, const void *index,
                   const float *values, float *acc) {
    // Accumulators: 16 of 32 registers with AVX-512 and NEON, 8 of 16 otherwise.
#if defined(__aarch64__)
    constexpr int kMost = 4;
#else
    constexpr int kMost = GS == 1 && L == 16 ? 4 : 2;
#endif
    if (w == 64)
        sparse_f32_t<GS, 64, L, kMost, Index>(x, segments, count, index, values, acc);
    else if (w == 32)
        sparse_f32_t < GS, 32, L,
            32 / L<kMost ? 32 / L : kMost, Index>(x, segments, count, index, values, acc);
    else if (w == 16)
        sparse_f32_t < GS, 16, L,
            16 / L<kMost ? 16 / L : kMost, Index>(x, segments, count, index, values, acc);
    else
        sparse_f32_t<GS, 4, 4, 1, Index>(x, segments, count, index, values, acc);
}

void sparse_f32(int gs, int w, const float *x, const uint16_t *segments, int count, const void *index,
                const float *values, float *acc) {
    if (gs == 4)
        sparse_f32_of<4, uint16_t>(w, x, segments, count, index, values, acc);
    else
        sparse_f32_of<1, uint8_t>(w, x, segments, count, index, values, acc);
}

} // namespace
} // namespace tautorch
