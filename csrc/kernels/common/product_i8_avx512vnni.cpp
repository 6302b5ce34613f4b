// int8 panels finished in registers.
#include "kernels/common/finish_avx512vnni.h"

namespace tautorch {
namespace {

inline __m512i broadcast4(const char *p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
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

inline __m512i half_dpbusd(__m512i sum, __m512i a, __m512i w) {
    return _mm512_castsi256_si512(_mm256_dpbusd_epi32(_mm512_castsi512_si256(sum), _mm512_castsi512_si256(a),
                                                      _mm512_castsi512_si256(w)));
}

// Bytes of the next panel that are fetched with every 16 inputs. Weights that come from memory arrive while
// the ones before are multiplied by all their rows.
constexpr int64_t kAhead = 128;

// Narrow: of the second vector's outputs 8 at most are there. On Zen 4 half a vector takes half the time.
template <int MR, int NV, bool Even, bool Narrow = false>
void tile(const ProductI8 &p, int i, int r0, const int8_t *ahead, int64_t rate) {
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
                const __m512i a = broadcast4(x[r] + 4 * u);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    sum[r][v] = Narrow && v == 1 ? half_dpbusd(sum[r][v], a, w[v])
                                                 : _mm512_dpbusd_epi32(sum[r][v], a, w[v]);
            }
        };
        int64_t q = 0;
        for (; q + 4 <= p.kq; q += 4) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u)
                products(u, c[u % U]);
            if constexpr (!Even && NV == 4) {
                _mm_prefetch(reinterpret_cast<const char *>(ahead), _MM_HINT_T1);
                ahead += rate;
            }
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

using Tile = void (*)(const ProductI8 &, int i, int r0, const int8_t *ahead, int64_t rate);
template <int NV, bool Even, bool Narrow = false>
constexpr Tile kTiles[12] = {
    tile<1, NV, Even, Narrow>,  tile<2, NV, Even, Narrow>,  tile<3, NV, Even, Narrow>,
    tile<4, NV, Even, Narrow>,  tile<5, NV, Even, Narrow>,  tile<6, NV, Even, Narrow>,
    tile<7, NV, Even, Narrow>,  tile<8, NV, Even, Narrow>,  tile<9, NV, Even, Narrow>,
    tile<10, NV, Even, Narrow>, tile<11, NV, Even, Narrow>, tile<12, NV, Even, Narrow>};
template <bool Even>
constexpr Tile kWideTiles[6] = {tile<1, 4, Even>, tile<2, 4, Even>, tile<3, 4, Even>,
                                tile<4, 4, Even>, tile<5, 4, Even>, tile<6, 4, Even>};

// Rows are dealt out evenly: two tiles of 4 run faster than one of 6 and one of 2. Every tile fetches its
// part of the next panel, until that is whole: of even rows as fast as it can, else evenly (whole panels).
void strip(const ProductI8 &p, const Tile *tiles, int most, int i) {
    const int parts = (p.count + most - 1) / most;
    const bool even = p.even();
    const int64_t quads = p.taps * (p.kq / 4), rate = fetch_rate(p, quads > 0 ? quads * parts : 1),
                  bytes = p.kq * 4 * p.width, part = quads * (even ? kAhead : rate);
    for (int j = 0; j < parts; ++j) {
        const int r0 = p.count * j / parts;
        const int64_t at = (i / 32 * parts + j) * part;
        tiles[p.count * (j + 1) / parts - r0 - 1](p, i, r0,
                                                  !even || at + part <= bytes ? p.next + at : p.panel, rate);
    }
}

} // namespace

void product_i8_avx512vnni(const ProductI8 &given) {
    ProductI8 p = given;
    const int done = p.panels > 1 ? 0 : product_i8_codes_avx512vnni(p);
    if (p.raw && done == 0)
        turn_top_bits(p.raw, p.count * 4 * p.kq, p.operands);
    if (p.panels > 1)
        return product_i8_rows_avx512vnni(p);
    const void *rest;
    if (done > 0) {
        if (p.even()) {
            rest = static_cast<const char *>(p.rows[0]) + done * p.row_step;
            p.rows = &rest;
        } else {
            p.rows += done;
        }
        p.row_scale += done;
        p.count -= done;
        p.next_bytes = 0; // fetched
        if (p.out_row)
            p.out_row += done;
        else
            p.out += done * p.row_bytes;
        if (p.count == 0)
            return;
    }
    const bool even = p.even();
    int i = 0;
    // 12 x 32 reads 128 bytes of weights in 12 cycles, 6 x 64 twice as many, and the 32 columns of a panel
    // that it walks stay in L1 up to 1024 inputs. Up to 8 rows memory is the limit: whole lines of a panel in
    // order. Without a common distance, 12 rows would need 12 pointers.
    if (p.width == 64 && (!even || p.count <= 8)) {
        strip(p, even ? kWideTiles<true> : kWideTiles<false>, 6, 0);
        return;
    }
    for (; i + 32 <= p.width; i += 32) {
        if (p.cols - i <= 24)
            strip(p, even ? kTiles<2, true, true> : kTiles<2, false, true>, 12, i);
        else
            strip(p, even ? kTiles<2, true> : kTiles<2, false>, 12, i);
    }
    if (i < p.width)
        strip(p, even ? kTiles<1, true> : kTiles<1, false>, 12, i);
}

} // namespace tautorch
