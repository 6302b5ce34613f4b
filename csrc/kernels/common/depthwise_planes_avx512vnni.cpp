// Lanes are pixels: 16 of an output row, whose bytes under four columns of the filter come from 64 by a
// permutation of words (to the 128 bits where they are needed) and one of bytes.
#include <immintrin.h>

#include "kernels/common/depthwise_planes.h"

namespace tautorch {
namespace {

// KH rows of filters of at most four columns; 0: any.
template <int KH> void run(const DepthwisePlanes &p) {
    const Geometry &g = *p.g;
    const int64_t quads = (g.kw + 3) / 4, down = g.dh * p.row;
    alignas(64) uint32_t words[16];
    alignas(64) uint8_t bytes[64];
    for (int i = 0; i < 16; ++i)
        words[i] = static_cast<uint32_t>(i / 4 * g.sw + i % 4);
    for (int i = 0; i < 64; ++i)
        bytes[i] = static_cast<uint8_t>(i / 4 % 4 * g.sw + i % 4 * g.dw);
    const __m512i to_lane = _mm512_load_si512(words), in_lane = _mm512_load_si512(bytes);
    const auto four = [&](const uint8_t *at) {
        return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(to_lane, _mm512_loadu_si512(at)), in_lane);
    };
    __m512i w[KH > 0 ? KH : 1];
#pragma GCC unroll 8
    for (int ky = 0; ky < KH; ++ky)
        w[ky] = _mm512_set1_epi32(p.weights[ky]);
    int32_t *sums = p.sums;
    for (int64_t y = 0; y < p.rows; ++y, sums += p.ow) {
        const uint8_t *row = p.x + y * g.sh * p.row;
        for (int64_t i = 0; i < p.ow; i += 16) {
            const uint8_t *at = row + i * g.sw;
            __m512i sum = _mm512_setzero_si512();
            if constexpr (KH > 0) {
#pragma GCC unroll 8
                for (int ky = 0; ky < KH; ++ky)
                    sum = _mm512_dpbusd_epi32(sum, four(at + ky * down), w[ky]);
            } else {
                for (int64_t ky = 0; ky < g.kh; ++ky)
                    for (int64_t q = 0; q < quads; ++q)
                        sum = _mm512_dpbusd_epi32(sum, four(at + ky * down + q * 4 * g.dw),
                                                  _mm512_set1_epi32(p.weights[ky * quads + q]));
            }
            _mm512_storeu_si512(sums + i, sum); // the next row writes over what is too much
        }
    }
}

} // namespace

void depthwise_planes_avx512vnni(const DepthwisePlanes &p) {
    if (p.g->kh == 3 && p.g->kw <= 4)
        run<3>(p);
    else
        run<0>(p);
}

} // namespace tautorch
