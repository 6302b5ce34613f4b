// AVX2 without VNNI. Both operands are widened to 16 bits: vpmaddubsw would saturate at 2 * 255 * 127.
#define TT_LANES 8
#include "kernels/common/depthwise.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/isa.h"
#include "kernels/common/panel.h"
#include "kernels/common/sparse_f32_kernel.h"
#define TT_DOT_BYTES 0
#include "kernels/common/sparse_plain.h"
#include "kernels/common/sparse_ymm.h"

namespace tautorch {
namespace {
constexpr int kKr = 2;
inline __m256i load_w(const int8_t *p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline __m256i madd(__m256i acc, __m256i x, __m256i w) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(x, w));
}
} // namespace
} // namespace tautorch

#define TT_PEAK_STEP "vpmaddwd %%ymm14, %%ymm15, %%ymm13\n\tvpaddd %%ymm13, %%ymm\\r, %%ymm\\r"
#include "kernels/common/dot_ymm.h"

namespace tautorch {

const Isa isa_avx2 = {
    "avx2",       1,         ActKind::s16, 16,          8,       kKr,      mr_of,        dot_i8,
    dot_f32,      rows_f32,  amax,         quantize,    to_f32,  epilogue, transpose_u8, panel_u8,
    transpose_32, sparse_i8, sparse_f32,   kPlainOrder, peak_i8, peak_f32, depthwise,
};

} // namespace tautorch
