// int8 tile and its epilogue in one: the accumulators leave as floats straight from their registers. Through
// a tile in memory a product of 32 to 128 inputs takes 1.3 to 2 times as long: the stores of the output then
// do not overlap the multiplications of the next tile.
#pragma once

#include "kernels/common/isa.h"
#include "kernels/common/simd.h"

namespace tautorch {
namespace {

// Rows of a tile by panel width. 6 x 64 and 12 x 32 keep 24 accumulators: two vpdpbusd a cycle at a latency
// of 4 to 5 need 10 in flight, and 6 + 4 loads per 24 products stay under two loads a cycle.
int32_t mr_of(int32_t width) { return width == 64 ? 6 : width == 48 ? 8 : 12; }

// Indices as a pack: accumulators are named by constants alone. With loops over them, GCC 12 keeps them on
// the stack: up to twice the time.
template <int... I> struct Indices {};
template <int N, int... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};
template <int N> using UpTo = typename MakeIndices<N>::type;

// c += x * w; asm for the same reason.
inline __attribute__((always_inline)) void dpbusd(__m512i &c, __m512i x, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(x), "v"(w));
}
inline __m512i broadcast4(const void *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

struct DirectTile {
    const void *const *rows;
    int64_t ld, taps, kq;
    const int8_t *panel;
    // of the panel's outputs, whole vectors
    const int32_t *correction;
    const float *w_scale, *bias;
    const float *row_scale, *addend; // [rows]; [rows][kTileN] or null
    bool relu;
    char *out;
    int64_t line_bytes;
};

// Accumulators of a tile out, by the arithmetic of epilogue.h. I: row * NV + vector.
template <DType T, bool Relu, bool Add, int NV, int... I>
inline __attribute__((always_inline)) void leave(const DirectTile &t, const __m512i *acc, Indices<I...>) {
    const auto one = [&t](int r, int v, __m512i a) __attribute__((always_inline)) {
        vf y = (vf)_mm512_cvtepi32_ps(a) * splat(t.row_scale[r]) * load<vf>(t.w_scale + 16 * v);
        if constexpr (Add)
            y += load<vf>(t.addend + r * kTileN + 16 * v);
        y += load<vf>(t.bias + 16 * v);
        store_from_f32<T>(t.out + r * t.line_bytes + 16 * v * size_of(T),
                          Relu ? activate<Activation::relu>(y) : y);
    };
    (one(I / NV, I % NV, acc[I]), ...);
}

// U: narrow tiles have too few chains to hide the latency; they are split over U groups of inputs.
template <DType T, int MR, int NV, int U, int... R, int... V, int... I>
inline __attribute__((always_inline)) void direct_tile(const DirectTile &t, Indices<R...>, Indices<V...>,
                                                       Indices<I...> all) {
    __m512i acc[MR * NV], more[U > 1 ? MR * NV : 1], even_more[U > 2 ? 2 * MR * NV : 1];
    ((acc[I] = _mm512_loadu_si512(t.correction + 16 * (I % NV))), ...);
    if constexpr (U > 1)
        ((more[I] = _mm512_setzero_si512()), ...);
    if constexpr (U > 2)
        ((even_more[I] = even_more[MR * NV + I] = _mm512_setzero_si512()), ...);
    const int8_t *b = t.panel;
    for (int64_t tap = 0; tap < t.taps; ++tap) {
        const char *a[MR];
        ((a[R] = static_cast<const char *>(t.rows[tap * t.ld + R])), ...);
        const auto step = [&](int64_t q, __m512i *c) __attribute__((always_inline)) {
            const __m512i w[NV] = {_mm512_loadu_si512(b + 64 * V)...};
            const __m512i x[MR] = {broadcast4(a[R] + 4 * q)...};
            b += 64 * NV;
            (dpbusd(c[I], x[I / NV], w[I % NV]), ...);
        };
        int64_t q = 0;
        for (; q + U <= t.kq; q += U) {
            step(q, acc);
            if constexpr (U > 1)
                step(q + 1, more);
            if constexpr (U > 2) {
                step(q + 2, even_more);
                step(q + 3, even_more + MR * NV);
            }
        }
        if constexpr (U > 1)
            for (; q < t.kq; ++q)
                step(q, acc);
    }
    if constexpr (U > 2)
        ((more[I] = _mm512_add_epi32(_mm512_add_epi32(more[I], even_more[I]), even_more[MR * NV + I])), ...);
    if constexpr (U > 1)
        ((acc[I] = _mm512_add_epi32(acc[I], more[I])), ...);
    if (t.addend)
        t.relu ? leave<T, true, true, NV>(t, acc, all) : leave<T, false, true, NV>(t, acc, all);
    else
        t.relu ? leave<T, true, false, NV>(t, acc, all) : leave<T, false, false, NV>(t, acc, all);
}

template <DType T, int MR, int NV> void direct_t(const DirectTile &t) {
    constexpr int U = MR * NV >= 8 ? 1 : MR * NV >= 4 ? 2 : 4;
    direct_tile<T, MR, NV, U>(t, UpTo<MR>{}, UpTo<NV>{}, UpTo<MR * NV>{});
}

using Direct = void (*)(const DirectTile &);

// [vectors of the panel - 1][rows - 1]
template <DType T>
constexpr Direct kDirect[4][12] = {
    {direct_t<T, 1, 1>, direct_t<T, 2, 1>, direct_t<T, 3, 1>, direct_t<T, 4, 1>, direct_t<T, 5, 1>,
     direct_t<T, 6, 1>, direct_t<T, 7, 1>, direct_t<T, 8, 1>, direct_t<T, 9, 1>, direct_t<T, 10, 1>,
     direct_t<T, 11, 1>, direct_t<T, 12, 1>},
    {direct_t<T, 1, 2>, direct_t<T, 2, 2>, direct_t<T, 3, 2>, direct_t<T, 4, 2>, direct_t<T, 5, 2>,
     direct_t<T, 6, 2>, direct_t<T, 7, 2>, direct_t<T, 8, 2>, direct_t<T, 9, 2>, direct_t<T, 10, 2>,
     direct_t<T, 11, 2>, direct_t<T, 12, 2>},
    {direct_t<T, 1, 3>, direct_t<T, 2, 3>, direct_t<T, 3, 3>, direct_t<T, 4, 3>, direct_t<T, 5, 3>,
     direct_t<T, 6, 3>, direct_t<T, 7, 3>, direct_t<T, 8, 3>},
    {direct_t<T, 1, 4>, direct_t<T, 2, 4>, direct_t<T, 3, 4>, direct_t<T, 4, 4>, direct_t<T, 5, 4>,
     direct_t<T, 6, 4>},
};

// p[0 .. n) in out[0 .. 64), or 64 times `absent`.
inline const float *whole(const float *p, int n, float absent, float *out) {
    if (p && n == kTileN)
        return p;
    for (int i = 0; i < kTileN; ++i)
        out[i] = p && i < n ? p[i] : absent;
    return out;
}

void product_i8(const Epilogue &e, const void *const *rows, int64_t ld, int m, int64_t taps, int64_t kq,
                const int8_t *panel, int width, int64_t n0, int cols, const float *row_scale, void *out,
                int64_t line_stride) {
    constexpr int kMost = 12; // rows of a tile
    alignas(64) int32_t correction[kTileN];
    alignas(64) float w_scale[kTileN], bias[kTileN];
    alignas(64) char narrow[kMost * kTileN * 4];
    // Unsigned: correction * colsum may pass 2^31, the corrected accumulator does not.
    for (int i = 0; i < kTileN; ++i)
        correction[i] = i < cols ? static_cast<int32_t>(static_cast<uint32_t>(e.correction) *
                                                        static_cast<uint32_t>(e.colsum[n0 + i]))
                                 : 0;
    constexpr float ones[kMost] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const bool partial = cols != width;
    const int64_t bytes = size_of(e.out_dtype), line_bytes = line_stride * bytes;
    DirectTile t = {};
    t.ld = ld;
    t.taps = taps;
    t.kq = kq;
    t.panel = panel;
    t.correction = correction;
    t.w_scale = whole(e.w_scale ? e.w_scale + n0 : nullptr, cols, 1.0f, w_scale);
    t.bias = whole(e.bias ? e.bias + n0 : nullptr, cols, 0.0f, bias);
    t.relu = e.activation == Activation::relu;
    t.line_bytes = partial ? kTileN * bytes : line_bytes;
    const int most = mr_of(width), parts = (m + most - 1) / most;
    for (int i = 0; i < parts; ++i) {
        const int r0 = m * i / parts, mr = m * (i + 1) / parts - r0; // dealt out evenly
        char *to = static_cast<char *>(out) + r0 * line_bytes;
        t.rows = rows + r0;
        t.row_scale = row_scale ? row_scale + r0 : ones;
        t.addend = e.addend ? e.addend + r0 * kTileN : nullptr;
        t.out = partial ? narrow : to;
        // Not (a ? one : other)[i][j]: GCC 12 indexes that wrongly in sanitizer builds.
        Direct run = kDirect<DType::f32>[width / 16 - 1][mr - 1];
        if (e.out_dtype == DType::bf16)
            run = kDirect<DType::bf16>[width / 16 - 1][mr - 1];
        else if (e.out_dtype == DType::f16)
            run = kDirect<DType::f16>[width / 16 - 1][mr - 1];
        run(t);
        if (partial)
            for (int r = 0; r < mr; ++r)
                std::memcpy(to + r * line_bytes, narrow + r * kTileN * bytes,
                            static_cast<size_t>(cols * bytes));
    }
}

} // namespace
} // namespace tautorch
