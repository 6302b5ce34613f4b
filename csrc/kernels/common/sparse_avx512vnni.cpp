// Sparse int8 by input-major panels, on AVX-512 with VNNI.
//
// Four kept inputs are four panel rows of 64 bytes; 8 byte and word interleaves (4 a cycle on Zen 5) turn
// them into operands of vpdpbusd, 16 rows of x each. With 4 outputs to share the interleave the products
// bound the kernel (8 cycles per 1024 multiply-accumulates); with one output the 12 operations do (3 cycles
// per 256).
#include "kernels/common/sparse_avx512vnni.h"

#include "kernels/common/finish_avx512vnni.h"
#include "kernels/common/interleave.h"

namespace tautorch {
namespace {

inline __m512i load512(const void *p) { return _mm512_loadu_si512(p); }
inline __m512i broadcast4(const void *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

// 64 rows of x for four inputs, whose bytes start at 8 i[0..3]: t[j] holds rows 16 j .. 16 j + 15, four bytes
// each.
inline __attribute__((always_inline)) void interleave64(const uint8_t *x, const uint16_t *i,
                                                        __m512i (&t)[4]) {
    const auto row = [x](uint16_t at) { return load512(x + int64_t{at} * 8); };
    const __m512i r0 = row(i[0]), r1 = row(i[1]), r2 = row(i[2]), r3 = row(i[3]);
    interleave_bytes(r0, r1, r2, r3, t);
}

// In assembly, because GCC 12 copies second accumulators around at every turn of the loop.
inline __attribute__((always_inline)) void dot(__m512i &acc, __m512i x, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// 4 x 4 in every 128-bit lane.
inline __attribute__((always_inline)) void turn_lanes(__m512 (&y)[4]) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(y[0], y[1])),
                  b = _mm512_castps_pd(_mm512_unpackhi_ps(y[0], y[1])),
                  c = _mm512_castps_pd(_mm512_unpacklo_ps(y[2], y[3])),
                  d = _mm512_castps_pd(_mm512_unpackhi_ps(y[2], y[3]));
    y[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    y[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    y[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    y[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

// One quad of kept inputs, i[0..3], times the GS outputs' values v.
template <int GS>
inline __attribute__((always_inline)) void quad(const uint8_t *x, const uint16_t *i, const int8_t *v,
                                                __m512i (&acc)[GS][4]) {
    __m512i t[4];
    interleave64(x, i, t);
#pragma GCC unroll 4
    for (int r = 0; r < GS; ++r) {
        const __m512i w = broadcast4(v + r * 4);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            dot(acc[r][j], t[j], w);
    }
}

template <int GS>
void panel64(const uint8_t *x, const uint32_t *start, const uint16_t *idx, const int8_t *values, int64_t g0,
             int64_t g1, bool add, int32_t *out) {
    // One output has 4 chains of products, too few for their latency of 4 to 5 cycles: two sets of them.
    constexpr int U = GS == 1 ? 2 : 1;
    for (int64_t g = g0; g < g1; ++g, out += GS * 64) {
        __m512i c[U][GS][4];
        for (int r = 0; r < GS; ++r)
            for (int j = 0; j < 4; ++j)
                c[0][r][j] = add ? load512(out + r * 64 + 16 * j) : _mm512_setzero_si512();
        if constexpr (U == 2)
            for (int j = 0; j < 4; ++j)
                c[1][0][j] = _mm512_setzero_si512();
        const uint16_t *i = idx + 4 * int64_t{start[g]}, *end = idx + 4 * int64_t{start[g + 1]};
        const int8_t *v = values + 4 * GS * int64_t{start[g]};
        for (; i + 4 * U <= end; i += 4 * U, v += 4 * U * GS)
#pragma GCC unroll 2
            for (int u = 0; u < U; ++u)
                quad<GS>(x, i + 4 * u, v + 4 * GS * u, c[u]);
        if (U == 2 && i < end)
            quad<GS>(x, i, v, c[0]);
        if constexpr (U == 2)
            for (int j = 0; j < 4; ++j)
                c[0][0][j] = _mm512_add_epi32(c[0][0][j], c[1][0][j]);
        for (int r = 0; r < GS; ++r)
            for (int j = 0; j < 4; ++j)
                _mm512_storeu_si512(out + r * 64 + 16 * j, c[0][r][j]);
    }
}

// What the sums of a tile's outputs start from, and what they are scaled with; numbers past the last output.
// NaN among them is the quiet one, as in the scales of rows.
struct TileScales {
    alignas(64) int32_t from[kTileOutputs];
    alignas(64) float w[kTileOutputs], b[kTileOutputs];

    explicit TileScales(const SparseScales &s) {
        for (int64_t n = 0; n < s.count; n += 16) {
            const int64_t left = s.count - n;
            // Modulo 2^32: the product may pass it, the corrected sum does not.
            _mm512_store_si512(
                from + n, s.colsum ? _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(first(left), s.colsum + n),
                                                        _mm512_set1_epi32(s.correction))
                                   : _mm512_setzero_si512());
            _mm512_store_ps(w + n, load_or(s.outputs, n, left, 1.0f));
            _mm512_store_ps(b + n, load_or(s.bias, n, left, 0.0f));
        }
    }
};

// Lists of four outputs whose sums leave as floats; Turned: as sparse_rows takes them. All that `s` says is
// read before the first list: the stores could change it for all that the compiler knows.
template <bool Turned>
void panel64_scaled(const uint8_t *x, const uint32_t *start, const uint16_t *idx, const int8_t *values,
                    int64_t g0, int64_t g1, bool add, float *__restrict out, const SparseScales &s) {
    const TileScales tile(s);
    const float *__restrict rows = s.rows, *__restrict w = tile.w, *__restrict b = tile.b;
    const int32_t *__restrict from = tile.from;
    const bool relu = s.relu;
    const char *line = s.line, *const past = s.line + s.lines * s.line_step;
    const int64_t line_step = s.line_step, line_bytes = s.line_bytes,
                  fetched = div_up(s.lines, g1 - g0) * line_step;
    for (int64_t g = g0; g < g1; ++g, out += 256, w += 4, b += 4, from += 4) {
        __m512i c[4][4];
        for (int r = 0; r < 4; ++r) {
            const __m512i first = _mm512_set1_epi32(from[r]);
            for (int j = 0; j < 4; ++j)
                c[r][j] = add ? _mm512_add_epi32(first, load512(out + r * 64 + 16 * j)) : first;
        }
        for (const char *last = line + fetched; line < last && line < past; line += line_step)
            for (int64_t at = 0; at < line_bytes; at += 64)
                asm volatile("prefetcht1 %0" : : "m"(line[at]));
        const uint16_t *i = idx + 4 * int64_t{start[g]}, *end = idx + 4 * int64_t{start[g + 1]};
        const int8_t *v = values + 16 * int64_t{start[g]};
        for (; i < end; i += 4, v += 16)
            quad<4>(x, i, v, c);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m512 y[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const __m512 scaled =
                    _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(c[r][j]), _mm512_loadu_ps(rows + 16 * j)),
                                  _mm512_set1_ps(w[r]));
                y[r] = _mm512_add_ps(scaled, _mm512_set1_ps(b[r]));
            }
            if (relu) // NaN stays: max gives back its second operand then
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r)
                    y[r] = _mm512_max_ps(_mm512_setzero_ps(), y[r]);
            if (Turned)
                turn_lanes(y);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r)
                _mm512_storeu_ps(out + (Turned ? 64 * j + 16 * r : 64 * r + 16 * j), y[r]);
        }
    }
}

// 16 rows' codes of 16 lists, [list][row][4 outputs], to 64 outputs of each row.
inline void codes_rows(const __m512i *list, int rows, __mmask64 outputs, char *to, int64_t step) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        const __m512i even = _mm512_load_si512(list + i), odd = _mm512_load_si512(list + i + 1);
        b[i] = _mm512_unpacklo_epi32(even, odd);
        b[i + 1] = _mm512_unpackhi_epi32(even, odd);
    }
    // a[4 q + i]: row 4 l + i of lists 4 q .. 4 q + 3 in lane l
#pragma GCC unroll 4
    for (int q = 0; q < 16; q += 4) {
        a[q] = _mm512_unpacklo_epi64(b[q], b[q + 2]);
        a[q + 1] = _mm512_unpackhi_epi64(b[q], b[q + 2]);
        a[q + 2] = _mm512_unpacklo_epi64(b[q + 1], b[q + 3]);
        a[q + 3] = _mm512_unpackhi_epi64(b[q + 1], b[q + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i l01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44),
                      h01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xee),
                      l23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44),
                      h23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xee);
        const __m512i y[4] = {_mm512_shuffle_i32x4(l01, l23, 0x88), _mm512_shuffle_i32x4(l01, l23, 0xdd),
                              _mm512_shuffle_i32x4(h01, h23, 0x88), _mm512_shuffle_i32x4(h01, h23, 0xdd)};
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l)
            if (4 * l + i < rows)
                _mm512_mask_storeu_epi8(to + (4 * l + i) * step, outputs, y[l]);
    }
}

// Lists of four outputs whose sums leave as int8, by the arithmetic of epilogue.h; saturation does for the
// lower bounds.
void panel64_codes(const uint8_t *x, const uint32_t *start, const uint16_t *idx, const int8_t *values,
                   int64_t g0, int64_t g1, const int32_t *__restrict sums, const SparseScales &s,
                   const TileScales &tile, const SparseCodes &to) {
    const float *__restrict rows = s.rows;
    const int32_t zero_point = to.epilogue->out_zero_point;
    const __m512 inv = _mm512_set1_ps(to.epilogue->out_inv_scale),
                 most = _mm512_set1_ps(static_cast<float>(127 - zero_point));
    const __m512i zero = _mm512_set1_epi16(static_cast<short>(zero_point)),
                  least = _mm512_set1_epi8(static_cast<char>(s.relu ? zero_point : -128));
    // Bytes [output][row] of every 128 bits to [row][output].
    const __m512i turn =
        _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    const char *line = s.line, *const past = s.line + s.lines * s.line_step;
    const int64_t line_step = s.line_step, line_bytes = s.line_bytes,
                  fetched = div_up(s.lines, g1 - g0) * line_step;
    constexpr int kLists = 16;
    __m512i codes[4][kLists] = {};
    for (int64_t g = g0; g < g1; ++g) {
        const int64_t n = (g - g0) * 4;
        __m512i c[4][4];
        for (int r = 0; r < 4; ++r) {
            const __m512i first = _mm512_set1_epi32(tile.from[n + r]);
            for (int j = 0; j < 4; ++j)
                c[r][j] = sums ? _mm512_add_epi32(first, load512(sums + (n + r) * 64 + 16 * j)) : first;
        }
        for (const char *last = line + fetched; line < last && line < past; line += line_step)
            for (int64_t at = 0; at < line_bytes; at += 64)
                asm volatile("prefetcht1 %0" : : "m"(line[at]));
        const uint16_t *i = idx + 4 * int64_t{start[g]}, *end = idx + 4 * int64_t{start[g + 1]};
        const int8_t *v = values + 16 * int64_t{start[g]};
        for (; i < end; i += 4, v += 16)
            quad<4>(x, i, v, c);
        const int at = static_cast<int>((g - g0) % kLists);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            __m512i q[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const __m512 scaled =
                    _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(c[r][j]), _mm512_loadu_ps(rows + 16 * j)),
                                  _mm512_set1_ps(tile.w[n + r]));
                const __m512 y = _mm512_mul_ps(_mm512_add_ps(scaled, _mm512_set1_ps(tile.b[n + r])), inv);
                q[r] = _mm512_cvtps_epi32(_mm512_min_ps(y, most));
            }
            const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), zero),
                          high = _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), zero);
            _mm512_store_si512(
                &codes[j][at],
                _mm512_shuffle_epi8(_mm512_max_epi8(_mm512_packs_epi16(low, high), least), turn));
        }
        if (at + 1 < kLists && g + 1 < g1)
            continue;
        const int64_t first = n - 4 * at, left = s.count - first;
        for (int j = 0; 16 * j < to.rows; ++j)
            codes_rows(codes[j], to.rows - 16 * j, left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1,
                       to.out + 16 * j * to.row_bytes + first, to.row_bytes);
    }
}

// 16 rows: four panel rows side by side in one register, transposed to [row][4 inputs] by a dword and a
// byte shuffle.
template <int GS>
void panel16(const uint8_t *x, const uint32_t *start, const uint16_t *idx, const int8_t *values, int64_t g0,
             int64_t g1, bool add, int32_t *out) {
    const __m512i dwords = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes =
        _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    const auto row = [x](uint16_t i) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(x + i * 2));
    };
    const auto interleave = [&](const uint16_t *i) __attribute__((always_inline)) {
        __m512i v = _mm512_castsi128_si512(row(i[0]));
        v = _mm512_inserti32x4(v, row(i[1]), 1);
        v = _mm512_inserti32x4(v, row(i[2]), 2);
        v = _mm512_inserti32x4(v, row(i[3]), 3);
        return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(dwords, v), bytes);
    };
    for (int64_t g = g0; g < g1; ++g, out += GS * 16) {
        __m512i c[2][GS];
        for (int r = 0; r < GS; ++r) {
            c[0][r] = add ? load512(out + r * 16) : _mm512_setzero_si512();
            c[1][r] = _mm512_setzero_si512();
        }
        int64_t q = start[g];
        const int64_t e = start[g + 1];
        const auto step = [&](int64_t at, __m512i(&acc)[GS]) __attribute__((always_inline)) {
            const __m512i t = interleave(idx + 4 * at);
#pragma GCC unroll 4
            for (int r = 0; r < GS; ++r)
                acc[r] = _mm512_dpbusd_epi32(acc[r], t, broadcast4(values + (at * GS + r) * 4));
        };
        for (; q + 2 <= e; q += 2) {
            step(q, c[0]);
            step(q + 1, c[1]);
        }
        if (q < e)
            step(q, c[0]);
        for (int r = 0; r < GS; ++r)
            _mm512_storeu_si512(out + r * 16, _mm512_add_epi32(c[0][r], c[1][r]));
    }
}

// 16 floats each of rows l = 0 .. 3, 4 * step apart, of which those under `rows` and `there` are.
template <DType T>
__attribute__((always_inline)) inline void store_rows(const __m512 (&y)[4], int i, int rows, __mmask16 there,
                                                      char *to, int64_t step) {
    __m256i half[4];
    if constexpr (T == DType::f16) {
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l)
            half[l] = _mm512_cvtps_ph(y[l], _MM_FROUND_TO_NEAREST_INT);
    }
    if constexpr (T == DType::bf16) { // NaN is the quiet one: see TileScales
#pragma GCC unroll 2
        for (int l = 0; l < 4; l += 2) {
            const __m512i both = bf16_of(y[l], y[l + 1]);
            half[l] = _mm512_castsi512_si256(both);
            half[l + 1] = _mm512_extracti64x4_epi64(both, 1);
        }
    }
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
        if (4 * l + i >= rows)
            continue;
        char *out = to + (4 * l + i) * step;
        if constexpr (T == DType::f32)
            _mm512_mask_storeu_ps(out, there, y[l]);
        else
            _mm256_mask_storeu_epi16(out, there, half[l]);
    }
}

template <DType T>
void sparse_rows(const float *turned, int block, int rows, int cols, char *to, int64_t step) {
    constexpr int64_t kList = 4 * 64;
    for (int i = 0; i < 4; ++i) {
        // Rows i, 4 + i, 8 + i and 12 + i: four rows a multiple of 4 KB apart fit a set of L1 (8 ways on
        // Zen 4). All 16 at once lose to copies of whole rows.
        const float *from = turned + 64 * block + 16 * i;
        for (int n = 0; n < cols; n += 16, from += 4 * kList) {
            const int left = cols - n;
            __m512 z[4];
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q)
                z[q] = 4 * q < left ? _mm512_loadu_ps(from + q * kList) : _mm512_setzero_ps();
            const __m512 a = _mm512_shuffle_f32x4(z[0], z[1], 0x44),
                         b = _mm512_shuffle_f32x4(z[2], z[3], 0x44),
                         c = _mm512_shuffle_f32x4(z[0], z[1], 0xee),
                         d = _mm512_shuffle_f32x4(z[2], z[3], 0xee);
            const __m512 y[4] = {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd),
                                 _mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd)};
            char *out = to + n * size_of(T);
            if (rows == 16 && left >= 16) // known to the compiler: stores without a mask
                store_rows<T>(y, i, 16, 0xffff, out, step);
            else
                store_rows<T>(y, i, rows, first(left), out, step);
        }
    }
}

} // namespace

void sparse_i8_avx512vnni(int gs, int w, const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                          const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc) {
    if (w == 64)
        (gs == 4 ? panel64<4> : panel64<1>)(x, start, idx, values, g0, g1, add, acc);
    else
        (gs == 4 ? panel16<4> : panel16<1>)(x, start, idx, values, g0, g1, add, acc);
}

void sparse_rows_avx512vnni(const float *turned, int block, int rows, int cols, DType dtype, char *to,
                            int64_t step) {
    if (dtype == DType::f32)
        sparse_rows<DType::f32>(turned, block, rows, cols, to, step);
    else if (dtype == DType::bf16)
        sparse_rows<DType::bf16>(turned, block, rows, cols, to, step);
    else
        sparse_rows<DType::f16>(turned, block, rows, cols, to, step);
}

bool sparse_i8_codes_avx512vnni(const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                                const int8_t *values, int64_t g0, int64_t g1, const int32_t *sums,
                                const SparseScales &scales, const SparseCodes &to) {
    if (!leaves_as_codes(*to.epilogue, scales.rows, to.rows))
        return false;
    const TileScales tile(scales);
    for (int64_t n = 0; n < scales.count; n += 16)
        if (!finite(_mm512_load_ps(tile.w + n)) || !finite(_mm512_load_ps(tile.b + n)))
            return false;
    panel64_codes(x, start, idx, values, g0, g1, sums, scales, tile, to);
    return true;
}

void sparse_i8_scaled_avx512vnni(const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                                 const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc,
                                 const SparseScales &scales) {
    (scales.turned ? panel64_scaled<true> : panel64_scaled<false>)(x, start, idx, values, g0, g1, add,
                                                                   reinterpret_cast<float *>(acc), scales);
}

} // namespace tautorch
