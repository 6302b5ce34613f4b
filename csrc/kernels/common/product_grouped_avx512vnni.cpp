// Groups of few channels, 16 outputs at a time (see grouped.h). On Zen 4 a pixel's 16 outputs of 4, 8 or 16
// channels a group and a 3x3 filter take 9, 18 or 36 products, and beside them 3 multiplications of the
// epilogue on the same two pipes; 8 and 16 channels also 2 and 6 shuffles that bring the quads' sums
// together. Tiles are small, so that the core sees the next one's products while the sums of this one leave.
#include "kernels/common/finish_avx512vnni.h"
#include "kernels/common/gemm.h"
#include "kernels/common/grouped.h"

#include <algorithm>

namespace tautorch {
namespace {

// Of 16 sums, once the quads' are added: which channel is in lane 4 j + p, and where each channel is.
template <int Q> struct Order {
    alignas(64) int32_t channel[16] = {}, lane[16] = {};
    alignas(64) uint8_t byte[64] = {};  // the same for each pixel's 16 bytes
    alignas(64) int32_t pixel[16] = {}; // of four pixels' codes as they come out of the packs
    // For what the sums of vector v start with.
    alignas(64) int32_t start[Q][16] = {};
    constexpr Order() {
        for (int j = 0; j < 4; ++j)
            for (int p = 0; p < 4; ++p) {
                const int c = Q == 2 ? p % 2 * 8 + p / 2 * 4 + j : 4 * p + j;
                channel[4 * j + p] = c;
                lane[c] = 4 * j + p;
                for (int i = 0; i < 4; ++i)
                    byte[16 * i + c] = static_cast<uint8_t>(4 * j + p);
                pixel[4 * p + j] = 4 * j + p;
                for (int v = 0; v < Q; ++v)
                    start[v][4 * j + p] = p / Q * 4 * Q + 4 * v + j;
            }
    }
};
template <int Q> constexpr Order<Q> kOrder;
// Lanes of quad 0, where the start goes.
template <int Q> constexpr __mmask16 kFirstQuads = Q == 1 ? 0xffff : Q == 2 ? 0x5555 : 0x1111;

// 16 channels.
template <int Q> struct Block {
    ToOutput to;
    const int8_t *weights;
    __m512i start[Q];
    // For codes: by lane.
    alignas(64) float w[16], bias[16];
    float inv, hi;
    __m512i zero, least; // zero point in 16 bits, and what codes are at least
    __mmask16 outputs;

    bool prepare(const GroupedI8 &g, int b, bool codes);
};

// Returns whether the sums leave as codes by finish_codes.
template <int Q> bool Block<Q>::prepare(const GroupedI8 &g, int b, bool codes) {
    const Order<Q> &order = kOrder<Q>;
    const Epilogue &e = *g.to.epilogue;
    to = g.to;
    to.n0 += b * kGroupedBlock;
    to.cols = std::min(kGroupedBlock, to.cols - b * kGroupedBlock);
    to.out += b * kGroupedBlock * size_of(e.out_dtype);
    weights = g.weights + b * g.count * Q * 64;
    const __m512i from = tautorch::start(to, 0);
    for (int v = 0; v < Q; ++v)
        start[v] = _mm512_maskz_permutexvar_epi32(kFirstQuads<Q>, _mm512_load_si512(order.start[v]), from);
    outputs = first(to.cols);
    const __m512 by_output =
                     e.w_scale ? _mm512_maskz_loadu_ps(outputs, e.w_scale + to.n0) : _mm512_set1_ps(1.0f),
                 add = e.bias ? _mm512_maskz_loadu_ps(outputs, e.bias + to.n0) : _mm512_setzero_ps();
    if (!codes || !finite(by_output) || !finite(add))
        return false;
    const __m512i channel = _mm512_load_si512(order.channel);
    _mm512_store_ps(w, _mm512_permutexvar_ps(channel, by_output));
    _mm512_store_ps(bias, _mm512_permutexvar_ps(channel, add));
    inv = e.out_inv_scale;
    hi = static_cast<float>(127 - e.out_zero_point);
    zero = _mm512_set1_epi16(static_cast<short>(e.out_zero_point));
    least = _mm512_set1_epi8(static_cast<char>(e.activation == Activation::relu ? e.out_zero_point : -128));
    return true;
}

inline __m512i pairs(__m512i a, __m512i b) { // [a0 + a1, a2 + a3, b0 + b1, b2 + b3] of every four
    const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}

// GCC 12 copies sums that an intrinsic updates.
__attribute__((always_inline)) inline void add_products(__m512i &sum, __m512i bytes, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(weights));
}

// Sums of MR pixels in the order of lanes. Across: so many taps, which lie a pixel's step apart, share what
// is loaded for them; a load of 64 bytes costs as much as a product.
template <int MR, int Q, int Across>
__attribute__((always_inline)) inline void sums(const GroupedI8 &g, const Block<Q> &block, const char *pixel,
                                                __m512i (&y)[MR]) {
    __m512i c[MR][Q];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Q; ++v)
            c[r][v] = block.start[v];
    const int8_t *b = block.weights;
    const int64_t step = g.step;
    for (int64_t t = 0; t < g.count; t += Across, b += 64 * Q * Across) {
        const char *x = pixel + g.taps[t];
        __m512i w[Across][Q];
#pragma GCC unroll 3
        for (int i = 0; i < Across; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < Q; ++v)
                w[i][v] = _mm512_loadu_si512(b + 64 * (Q * i + v));
#pragma GCC unroll 10
        for (int p = 0; p < MR + Across - 1; ++p, x += step) {
            const __m512i in = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
#pragma GCC unroll 3
            for (int i = 0; i < Across; ++i)
                if (p >= i && p - i < MR)
#pragma GCC unroll 4
                    for (int v = 0; v < Q; ++v)
                        add_products(c[p >= i && p - i < MR ? p - i : 0][v], in, w[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
        y[r] = Q == 1   ? c[r][0]
               : Q == 2 ? pairs(c[r][0], c[r][Q > 1 ? 1 : 0])
                        : pairs(pairs(c[r][0], c[r][Q > 1 ? 1 : 0]),
                                pairs(c[r][Q > 2 ? 2 : 0], c[r][Q > 2 ? 3 : 0]));
}

// By the arithmetic of epilogue.h. Saturation does for the lower bounds.
template <int MR, int Q>
__attribute__((always_inline)) inline void finish_codes(const Block<Q> &k, int row, const __m512i (&y)[MR]) {
    const __m512i order = _mm512_load_si512(kOrder<Q>.byte), by_pixel = _mm512_load_si512(kOrder<Q>.pixel);
    const __m512 w = _mm512_load_ps(k.w), bias = _mm512_load_ps(k.bias), inv = _mm512_set1_ps(k.inv),
                 hi = _mm512_set1_ps(k.hi);
    const auto code = [&](int r) __attribute__((always_inline)) {
        if (r >= MR)
            return _mm512_setzero_si512();
        const __m512 s = _mm512_mul_ps(
            _mm512_mul_ps(_mm512_cvtepi32_ps(y[r < MR ? r : 0]), _mm512_set1_ps(k.to.row_scale[row + r])), w);
        return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_mul_ps(_mm512_add_ps(s, bias), inv), hi));
    };
#pragma GCC unroll 2
    for (int r = 0; r < MR; r += 4) {
        const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(code(r), code(r + 1)), k.zero),
                      cd = _mm512_adds_epi16(_mm512_packs_epi32(code(r + 2), code(r + 3)), k.zero);
        const __m512i codes = _mm512_max_epi8(_mm512_packs_epi16(ab, cd), k.least);
        const __m512i four = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(by_pixel, codes), order);
        const __m128i pixel[4] = {_mm512_castsi512_si128(four), _mm512_extracti32x4_epi32(four, 1),
                                  _mm512_extracti32x4_epi32(four, 2), _mm512_extracti32x4_epi32(four, 3)};
        char *out = k.to.out + (row + r) * k.to.row_bytes;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, out += k.to.row_bytes)
            if (r + i < MR && k.outputs == 0xffff)
                _mm_storeu_si128(reinterpret_cast<__m128i *>(out), pixel[i]);
            else if (r + i < MR)
                _mm_mask_storeu_epi8(out, k.outputs, pixel[i]);
    }
}

// With what follows in the same function, GCC 12 keeps the sums in memory, a load and a store around each
// product.
template <int MR, int Q, int Across>
__attribute__((noinline)) void store_sums(const GroupedI8 &g, const Block<Q> &block, const char *pixel,
                                          int32_t (*out)[16]) {
    __m512i y[MR];
    sums<MR, Q, Across>(g, block, pixel, y);
    const __m512i lane = _mm512_load_si512(kOrder<Q>.lane);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
        _mm512_store_si512(out[r], _mm512_permutexvar_epi32(lane, y[r]));
}

template <int MR>
__attribute__((noinline)) void finish_stored(const ToOutput &to, int row, int32_t (*y)[16]) {
    __m512i c[MR][1];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
        c[r][0] = _mm512_load_si512(y[r]);
    finish<MR, 1>(to, 0, row, c);
}

// MR pixels, all blocks.
template <int MR, int Q, int Across, bool Codes>
void tile(const GroupedI8 &g, const Block<Q> *blocks, int count, const char *pixel, int row) {
    for (int b = 0; b < count; ++b) {
        const char *x = pixel + kGroupedBlock * b;
        if constexpr (Codes) {
            __m512i y[MR];
            sums<MR, Q, Across>(g, blocks[b], x, y);
            finish_codes<MR, Q>(blocks[b], row, y);
        } else {
            alignas(64) int32_t y[MR][16];
            store_sums<MR, Q, Across>(g, blocks[b], x, y);
            finish_stored<MR>(blocks[b].to, row, y);
        }
    }
}

template <int Q> constexpr int kMost = Q == 1 ? 8 : 4; // pixels of a tile
template <int Q> using Tile = void (*)(const GroupedI8 &, const Block<Q> *, int, const char *, int);
template <int MR, int Q, int Across, bool Codes> constexpr Tile<Q> tile_of() {
    if constexpr (MR <= kMost<Q>)
        return tile<MR, Q, Across, Codes>;
    else
        return nullptr;
}
template <int Q, int Across, bool Codes>
constexpr Tile<Q> kTiles[8] = {tile_of<1, Q, Across, Codes>(), tile_of<2, Q, Across, Codes>(),
                               tile_of<3, Q, Across, Codes>(), tile_of<4, Q, Across, Codes>(),
                               tile_of<5, Q, Across, Codes>(), tile_of<6, Q, Across, Codes>(),
                               tile_of<7, Q, Across, Codes>(), tile_of<8, Q, Across, Codes>()};

// Whether the taps come in threes at a pixel's distance. Four products a load leave nothing to share.
template <int Q> bool in_threes(const GroupedI8 &g) {
    if (Q == 4 || g.count % 3 != 0)
        return false;
    for (int64_t t = 0; t < g.count; ++t)
        if (t % 3 != 0 && g.taps[t] - g.taps[t - 1] != g.step)
            return false;
    return true;
}

template <int Q> void run(const GroupedI8 &g) {
    const int count = (g.to.cols + kGroupedBlock - 1) / kGroupedBlock;
    const GroupedRun &last = g.runs[g.run_count - 1];
    bool codes = leaves_as_codes(*g.to.epilogue, g.to.row_scale, last.row + last.count);
    Block<Q> blocks[kTileN / kGroupedBlock];
    for (int b = 0; b < count; ++b)
        codes = blocks[b].prepare(g, b, codes);
    constexpr int kThree = Q == 4 ? 1 : 3;
    const Tile<Q> *tiles = in_threes<Q>(g) ? (codes ? kTiles<Q, kThree, true> : kTiles<Q, kThree, false>)
                                           : (codes ? kTiles<Q, 1, true> : kTiles<Q, 1, false>);
    for (int i = 0; i < g.run_count; ++i) {
        const GroupedRun &r = g.runs[i];
        const int parts = (r.count + kMost<Q> - 1) / kMost<Q>;
        for (int j = 0; j < parts; ++j) {
            const int from = r.count * j / parts, n = r.count * (j + 1) / parts - from;
            tiles[n - 1](g, blocks, count, r.first + g.shift + from * g.step, r.row + from);
        }
    }
}

} // namespace

void grouped_i8_avx512vnni(const GroupedI8 &g) {
    g.quads == 1 ? run<1>(g) : g.quads == 2 ? run<2>(g) : run<4>(g);
}

} // namespace tautorch
