// Lanes are pixels: 16 of an output row, whose bytes under four columns of the filter come from 64 by a
// permutation of words (to the 128 bits where they are needed) and one of bytes.
#include <immintrin.h>

#include "kernels/common/depthwise_planes.h"

namespace tautorch {
namespace {

// The bytes that 16 pixels see of four columns of the filter.
struct Columns {
    __m512i to_lane, in_lane;

    explicit Columns(const Geometry &g) {
        const auto all = [](int64_t v) { return _mm512_set1_epi32(static_cast<int>(v)); };
        const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0),
                      in = _mm512_set4_epi32(3, 2, 1, 0);
        to_lane = _mm512_add_epi32(_mm512_mullo_epi32(lane, all(g.sw)), in);
        // Bytes below 16: none carries.
        in_lane = _mm512_add_epi32(_mm512_mullo_epi32(in, all(g.sw * 0x01010101)), all(g.dw * 0x03020100));
    }
    __m512i at(const uint8_t *x) const {
        return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(to_lane, _mm512_loadu_si512(x)), in_lane);
    }
};

// One plane's part of a task.
struct Plane {
    const uint8_t *x;
    const int32_t *weights;
    int32_t *sums;
};

// R rows of output by filters of three rows and at most four columns. More than one where neither strides nor
// dilation leave out rows: each row of x is then read once for all.
template <int R>
void three_rows(const DepthwisePlanes &p, const Plane &plane, const Columns &columns, int64_t y) {
    const int64_t ow = p.ow, sw = p.g->sw, down = p.g->dh * p.row;
    const __m512i w[3] = {_mm512_set1_epi32(plane.weights[0]), _mm512_set1_epi32(plane.weights[1]),
                          _mm512_set1_epi32(plane.weights[2])};
    const uint8_t *x = plane.x + y * p.g->sh * p.row;
    int32_t *to = plane.sums + y * ow;
    // From the right, so that what is too much in a row is written over by the next one.
    for (int64_t i = (ow - 1) / 16 * 16; i >= 0; i -= 16) {
        __m512i sum[R];
        for (int r = 0; r < R; ++r)
            sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int r = 0; r < R + 2; ++r) {
            const __m512i four = columns.at(x + i * sw + r * down);
#pragma GCC unroll 3
            for (int ky = 0; ky < 3; ++ky)
                if (r - ky >= 0 && r - ky < R)
                    sum[r - ky] = _mm512_dpbusd_epi32(sum[r - ky], four, w[ky]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
            _mm512_storeu_si512(to + r * ow + i, sum[r]);
    }
}

void any_rows(const DepthwisePlanes &p, const Plane &plane, const Columns &columns) {
    const Geometry &g = *p.g;
    const int64_t quads = (g.kw + 3) / 4;
    for (int64_t y = 0; y < p.rows; ++y)
        for (int64_t i = 0; i < p.ow; i += 16) {
            const uint8_t *x = plane.x + y * g.sh * p.row + i * g.sw;
            const int32_t *w = plane.weights;
            __m512i sum = _mm512_setzero_si512();
            for (int64_t ky = 0; ky < g.kh; ++ky, x += g.dh * p.row)
                for (int64_t q = 0; q < quads; ++q, ++w)
                    sum = _mm512_dpbusd_epi32(sum, columns.at(x + q * 4 * g.dw), _mm512_set1_epi32(*w));
            _mm512_storeu_si512(plane.sums + y * p.ow + i, sum);
        }
}

} // namespace

void depthwise_planes_avx512vnni(const DepthwisePlanes &p) {
    const Geometry &g = *p.g;
    const Columns columns(g);
    const bool three = g.kh == 3 && g.kw <= 4, whole = g.sh == 1 && g.dh == 1;
    for (int64_t j = 0; j < p.planes; ++j) {
        const Plane plane = {p.x + j * p.x_step, p.weights + j * p.weights_step, p.sums + j * p.sums_step};
        if (!three) {
            any_rows(p, plane, columns);
            continue;
        }
        int64_t y = 0;
        for (; whole && y + 4 <= p.rows; y += 4)
            three_rows<4>(p, plane, columns, y);
        if (whole && y + 2 <= p.rows) {
            three_rows<2>(p, plane, columns, y);
            y += 2;
        }
        for (; y < p.rows; ++y)
            three_rows<1>(p, plane, columns, y);
    }
}

} // namespace tautorch
