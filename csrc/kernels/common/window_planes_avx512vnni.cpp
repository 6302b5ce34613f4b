#include <immintrin.h>

#include "kernels/common/interleave.h"
#include "kernels/common/product_planes.h"
#include "kernels/common/window_planes.h"

namespace tautorch {

void words_of_runs_avx512vnni(const uint8_t *x, const int64_t *runs, int64_t quads, uint32_t *out) {
    // Bytes interleave within 128 bits: four pixels to each of them in turn, so that they come out in order.
    alignas(64) static const uint32_t turn[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const __m512i order = _mm512_load_si512(turn);
    for (int64_t q = 0; q < quads; ++q, runs += 4, out += kPlanePixels) {
        const auto run = [&](int i) {
            return _mm512_permutexvar_epi32(order, _mm512_loadu_si512(x + runs[i]));
        };
        __m512i t[4];
        interleave_bytes(run(0), run(1), run(2), run(3), t);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            _mm512_store_si512(out + 16 * i, t[i]);
    }
}

} // namespace tautorch
