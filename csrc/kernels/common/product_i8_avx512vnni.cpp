// int8 panels finished in registers: accumulators are scaled, converted and stored right where they were
// summed, while the next tile's products already run. Through a tile in memory, each output costs a store
// and a load more, and nothing overlaps.
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#include "kernels/common/product_i8.h"

namespace tautorch {
namespace {

// One instruction, vpxord with a broadcast operand: turning the top bit costs nothing beside the products.
inline __m512i broadcast4(const char *p, __m512i flip) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_xor_si512(flip, _mm512_set1_epi32(v));
}

// The rows of a tile under one tap. Even: at one distance from each other, so that four pointers and two
// multiples of the distance address twelve rows; twelve pointers would not fit the registers.
template <int MR, bool Even> struct Rows {
    const char *at[Even ? (MR + 2) / 3 : MR];
    int64_t step;
    Rows(const ProductI8 &p, int64_t tap, int r0) : step(p.row_step) {
        const void *const *rows = p.rows + tap * p.ld;
        for (int i = 0; i < (Even ? (MR + 2) / 3 : MR); ++i)
            at[i] =
                static_cast<const char *>(Even ? rows[0] : rows[r0 + i]) + (Even ? (r0 + 3 * i) * step : 0);
    }
    __attribute__((always_inline)) const char *operator[](int r) const {
        return Even ? at[r / 3] + r % 3 * step : at[r];
    }
    __attribute__((always_inline)) void advance(int64_t bytes) {
        for (auto &p : at)
            p += bytes;
    }
};

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

// The high (1) or low (0) halves of two vectors' 32-bit lanes, in order.
template <int High> struct Halves {
    alignas(64) uint16_t at[32] = {};
    constexpr Halves() {
        for (int i = 0; i < 32; ++i)
            at[i] = static_cast<uint16_t>(2 * i + High);
    }
};
template <int High> constexpr Halves<High> kHalves;
template <int High> inline __m512i halves(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(kHalves<High>.at), b);
}

// To nearest, ties to even: 6 operations for 32 outputs. NaN must be the quiet one, which no carry turns into
// a number.
inline __m512i bf16_of(__m512 a, __m512 b) {
    const __m512i ai = _mm512_castps_si512(a), bi = _mm512_castps_si512(b);
    const __m512i high = halves<1>(ai, bi), low = halves<0>(ai, bi);
    const __m512i half =
        _mm512_sub_epi16(_mm512_set1_epi16(-0x8000), _mm512_and_si512(high, _mm512_set1_epi16(1)));
    return _mm512_mask_sub_epi16(high, _mm512_cmpgt_epu16_mask(low, half), high, _mm512_set1_epi16(-1));
}

// Clamping before rounding is the same, as the bounds are integers; so is clamping at 0 for relu. Of a quiet
// NaN the low bits that are kept are 0: it becomes the zero point.
struct Requantize {
    __m512 inv, lo, hi;
    __m512i zp;
    explicit Requantize(const Epilogue &e) {
        const int least = e.activation == Activation::relu ? 0 : -128 - e.out_zero_point;
        inv = _mm512_set1_ps(e.out_inv_scale);
        lo = _mm512_set1_ps(static_cast<float>(least));
        hi = _mm512_set1_ps(static_cast<float>(127 - e.out_zero_point));
        zp = _mm512_set1_epi16(static_cast<short>(e.out_zero_point));
    }
    // Whose low 16 bits are the integer without its zero point. min and max give back their second operand
    // where either is NaN.
    __attribute__((always_inline)) __m512i integers(__m512 y) const {
        const __m512 v = _mm512_min_ps(hi, _mm512_max_ps(lo, _mm512_mul_ps(y, inv)));
        return _mm512_castps_si512(_mm512_add_ps(v, _mm512_set1_ps(12582912.0f)));
    }
    __attribute__((always_inline)) __m256i operator()(__m512 a, __m512 b) const {
        return _mm512_cvtepi16_epi8(_mm512_add_epi16(halves<0>(integers(a), integers(b)), zp));
    }
};

inline __m512 quiet(__m512 y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")));
}

inline __m512 load_or(const float *values, int64_t i, int64_t left, float absent) {
    return values ? quiet(_mm512_maskz_loadu_ps(first(left), values + i)) : _mm512_set1_ps(absent);
}

// What the sums start from. Unsigned: correction * colsum may pass 2^31, the corrected sum does not.
inline __m512i start(const ProductI8 &p, int64_t i) {
    const Epilogue &e = *p.epilogue;
    if (e.correction == 0)
        return _mm512_setzero_si512();
    return _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(first(p.cols - i), e.colsum + p.n0 + i),
                              _mm512_set1_epi32(e.correction));
}

// Columns from i on, rows from r0 on. By the arithmetic of epilogue.h.
template <int MR, int NV>
__attribute__((always_inline)) inline void finish(const ProductI8 &p, int i, int r0,
                                                  const __m512i (&c)[MR][NV]) {
    const Epilogue &e = *p.epilogue;
    const int64_t left = p.cols - i, size = size_of(e.out_dtype);
    alignas(64) char partial[MR * NV * 64];
    const bool whole = left >= 16 * NV;
    const auto line = [&](int r) __attribute__((always_inline)) {
        return p.out + (p.out_row ? p.out_row[r0 + r] : r0 + r) * p.row_bytes + i * size;
    };
    const auto out_of = [&](int r) __attribute__((always_inline)) {
        return whole ? line(r) : partial + r * 16 * NV * size;
    };
    // Every loop over accumulators is unrolled: one that is not puts all of them into memory, from the first
    // product on.
    if (e.out_dtype == DType::i32) {
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r) {
            char *out = out_of(r);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                _mm512_storeu_si512(out + 64 * v, c[r][v]);
        }
    } else {
        __m512 w[NV], b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            w[v] = load_or(e.w_scale, p.n0 + i + 16 * v, left - 16 * v, 1.0f);
            b[v] = load_or(e.bias, p.n0 + i + 16 * v, left - 16 * v, 0.0f);
        }
        const auto each = [&](auto &&put) __attribute__((always_inline)) {
#pragma GCC unroll 12
            for (int r = 0; r < MR; ++r) {
                char *out = out_of(r);
                const __m512 scale = _mm512_set1_ps(p.row_scale[r0 + r]);
                __m512 y[NV + 1]; // one more, so that all go by twos
                y[NV] = _mm512_setzero_ps();
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) {
                    y[v] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(c[r][v]), scale), w[v]);
                    if (e.addend)
                        y[v] = quiet(_mm512_add_ps(
                            y[v], _mm512_loadu_ps(e.addend + (r0 + r) * e.addend_stride + i + 16 * v)));
                    y[v] = _mm512_add_ps(y[v], b[v]);
                }
#pragma GCC unroll 2
                for (int v = 0; v < NV; v += 2)
                    put(out, v, y[v], y[v + 1]);
            }
        };
        // max gives back its second operand where either is NaN: a row of NaN stays one.
        const __m512 least =
            e.activation == Activation::relu ? _mm512_setzero_ps() : _mm512_set1_ps(-__builtin_inff());
        switch (e.out_dtype) {
        case DType::f32:
            each([least](char *o, int v, __m512 y, __m512 z) __attribute__((always_inline)) {
                _mm512_storeu_ps(o + 64 * v, _mm512_max_ps(least, y));
                if (v + 1 < NV)
                    _mm512_storeu_ps(o + 64 * v + 64, _mm512_max_ps(least, z));
            });
            break;
        case DType::bf16:
            each([least](char *o, int v, __m512 y, __m512 z) __attribute__((always_inline)) {
                const __m512i q = bf16_of(_mm512_max_ps(least, y), _mm512_max_ps(least, z));
                if (v + 1 < NV)
                    _mm512_storeu_si512(o + 32 * v, q);
                else
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(o + 32 * v), _mm512_castsi512_si256(q));
            });
            break;
        case DType::f16:
            each([least](char *o, int v, __m512 y, __m512 z) __attribute__((always_inline)) {
                const auto one = [&](int64_t at, __m512 f) __attribute__((always_inline)) {
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(o + at),
                                        _mm512_cvtps_ph(_mm512_max_ps(least, f), _MM_FROUND_TO_NEAREST_INT));
                };
                one(32 * v, y);
                if (v + 1 < NV)
                    one(32 * v + 32, z);
            });
            break;
        default: {
            const Requantize q(e);
            each([&q](char *o, int v, __m512 y, __m512 z) __attribute__((always_inline)) {
                if (v + 1 < NV)
                    _mm256_storeu_si256(reinterpret_cast<__m256i *>(o + 16 * v), q(y, z));
                else
                    _mm_storeu_si128(reinterpret_cast<__m128i *>(o + 16 * v),
                                     _mm256_castsi256_si128(q(y, z)));
            });
        }
        }
    }
    if (!whole)
        for (int r = 0; r < MR; ++r)
            std::memcpy(line(r), partial + r * 16 * NV * size, static_cast<size_t>(left * size));
}

// Bytes of the next panel that are fetched with every 16 inputs. Weights that come from memory arrive while
// the ones before are multiplied by all their rows.
constexpr int64_t kAhead = 128;

inline void prefetch_to_write(const char *p) { asm volatile("prefetchw %0" : : "m"(*p)); }

template <int MR, int NV, bool Even> void tile(const ProductI8 &p, int i, int r0, const int8_t *ahead) {
    // Two products a cycle at a latency of 4 to 5 cycles need ten chains: small tiles split theirs over U
    // groups of inputs.
    constexpr int U = MR * NV >= 10 ? 1 : MR * NV >= 5 ? 2 : 4;
    const int8_t *b = p.panel + 4 * i;
    const int64_t step = 4 * p.width;
    // Lines that the tile will write, a row of them with every 16 inputs. Stores to outputs that no cache
    // holds, waiting for their lines one tile's worth at a time, took 5 % at 512 x 1024 x 4096.
    const int64_t row_bytes = 16 * NV * size_of(p.epilogue->out_dtype);
    const char *line = p.out + r0 * p.row_bytes + i * size_of(p.epilogue->out_dtype);
    const int64_t last = row_bytes > 64 ? 64 : row_bytes - 1;
    int lines = MR;
    const __m512i flip = _mm512_set1_epi32(p.flip ? static_cast<int32_t>(0x80808080) : 0);
    __m512i c[U][MR][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        const __m512i from = start(p, i + 16 * v);
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 12
            for (int r = 0; r < MR; ++r)
                c[u][r][v] = u == 0 ? from : _mm512_setzero_si512();
    }
    for (int64_t t = 0; t < (Even ? 1 : p.taps); ++t) {
        Rows<MR, Even> x(p, t, r0);
        const auto products = [&](int u, __m512i(&sum)[MR][NV]) __attribute__((always_inline)) {
            __m512i w[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                w[v] = _mm512_loadu_si512(b + 64 * v);
            b += step;
#pragma GCC unroll 12
            for (int r = 0; r < MR; ++r) {
                const __m512i a = broadcast4(x[r] + 4 * u, flip);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], a, w[v]);
            }
        };
        int64_t q = 0;
        for (; q + 4 <= p.kq; q += 4) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u)
                products(u, c[u % U]);
            if constexpr (Even && NV == 2) {
                _mm_prefetch(reinterpret_cast<const char *>(ahead), _MM_HINT_T1);
                _mm_prefetch(reinterpret_cast<const char *>(ahead + 64), _MM_HINT_T1);
                ahead += kAhead;
                if (lines > 0) {
                    prefetch_to_write(line);
                    prefetch_to_write(line + last);
                    line += p.row_bytes;
                    --lines;
                }
            }
            x.advance(16);
        }
        for (; q < p.kq; ++q) {
            products(0, c[0]);
            x.advance(4);
        }
        b += p.gap;
    }
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u)
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v)
                c[0][r][v] = _mm512_add_epi32(c[0][r][v], c[u][r][v]);
    finish<MR, NV>(p, i, r0, c[0]);
}

using Tile = void (*)(const ProductI8 &, int i, int r0, const int8_t *ahead);
template <int NV, bool Even>
constexpr Tile kTiles[12] = {tile<1, NV, Even>, tile<2, NV, Even>,  tile<3, NV, Even>,  tile<4, NV, Even>,
                             tile<5, NV, Even>, tile<6, NV, Even>,  tile<7, NV, Even>,  tile<8, NV, Even>,
                             tile<9, NV, Even>, tile<10, NV, Even>, tile<11, NV, Even>, tile<12, NV, Even>};
template <bool Even>
constexpr Tile kWideTiles[6] = {tile<1, 4, Even>, tile<2, 4, Even>, tile<3, 4, Even>,
                                tile<4, 4, Even>, tile<5, 4, Even>, tile<6, 4, Even>};

// Rows are dealt out evenly: two tiles of 4 run faster than one of 6 and one of 2. Every tile fetches its
// part of the next panel, until that is whole.
void strip(const ProductI8 &p, const Tile *tiles, int most, int i) {
    const int parts = (p.count + most - 1) / most;
    const int64_t bytes = p.taps * p.kq * 4 * p.width, part = p.kq / 4 * kAhead;
    for (int j = 0; j < parts; ++j) {
        const int r0 = p.count * j / parts;
        const int64_t at = (i / 32 * parts + j) * part;
        tiles[p.count * (j + 1) / parts - r0 - 1](p, i, r0, at + part <= bytes ? p.next + at : p.panel);
    }
}

// Groups of few channels: the inputs of all 16 outputs in one load, and a permutation for each quad.
template <int MR, int Q, bool Wide> void grouped_tile(const GroupedI8 &g, int r0) {
    const ProductI8 &p = g.p;
    __m512i c[MR][1], spread[Q];
    const __m512i from = start(p, 0);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r)
        c[r][0] = from;
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
        spread[q] = _mm512_load_si512(g.spread[q]);
    const int8_t *b = p.panel;
    for (int64_t t = 0; t < p.taps; ++t) {
        Rows<MR, true> x(p, t, r0);
        __m512i w[Q];
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q, b += 64)
            w[q] = _mm512_loadu_si512(b);
#pragma GCC unroll 12
        for (int r = 0; r < MR; ++r) {
            const __m512i in =
                Wide ? _mm512_loadu_si512(x[r])
                     : _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x[r])));
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q)
                c[r][0] = _mm512_dpbusd_epi32(c[r][0], _mm512_permutexvar_epi32(spread[q], in), w[q]);
        }
    }
    finish<MR, 1>(p, 0, r0, c);
}

using GroupedTile = void (*)(const GroupedI8 &, int r0);
template <int Q, bool Wide>
constexpr GroupedTile kGrouped[12] = {
    grouped_tile<1, Q, Wide>,  grouped_tile<2, Q, Wide>,  grouped_tile<3, Q, Wide>,
    grouped_tile<4, Q, Wide>,  grouped_tile<5, Q, Wide>,  grouped_tile<6, Q, Wide>,
    grouped_tile<7, Q, Wide>,  grouped_tile<8, Q, Wide>,  grouped_tile<9, Q, Wide>,
    grouped_tile<10, Q, Wide>, grouped_tile<11, Q, Wide>, grouped_tile<12, Q, Wide>};

} // namespace

void grouped_i8_avx512vnni(const GroupedI8 &g) {
    const GroupedTile *tiles = g.quads == 1 ? (g.wide ? kGrouped<1, true> : kGrouped<1, false>)
                                            : (g.wide ? kGrouped<2, true> : kGrouped<2, false>);
    const int parts = (g.p.count + 11) / 12;
    for (int j = 0; j < parts; ++j) {
        const int r0 = g.p.count * j / parts;
        tiles[g.p.count * (j + 1) / parts - r0 - 1](g, r0);
    }
}

void product_i8_avx512vnni(const ProductI8 &p) {
    if (p.panels > 1)
        return product_i8_rows_avx512vnni(p);
    const bool even = p.even();
    int i = 0;
    // 12 x 32 reads 128 bytes of weights in 12 cycles, 6 x 64 twice as many, and the 32 columns of a panel
    // that it walks stay in L1 up to 1024 inputs. Up to 8 rows memory is the limit: whole lines of a panel in
    // order. Without a common distance, 12 rows would need 12 pointers.
    if (p.width == 64 && (!even || p.count <= 8)) {
        strip(p, even ? kWideTiles<true> : kWideTiles<false>, 6, 0);
        return;
    }
    for (; i + 32 <= p.width; i += 32)
        strip(p, even ? kTiles<2, true> : kTiles<2, false>, 12, i);
    if (i < p.width)
        strip(p, even ? kTiles<1, true> : kTiles<1, false>, 12, i);
}

} // namespace tautorch
