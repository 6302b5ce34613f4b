// AVX-VNNI: vpdpbusd on 256 bits (client cores since Alder Lake, Zen 5). Activations are q + 128.
#define TT_LANES 8
#include "kernels/common/epilogue.h"
#include "kernels/common/isa.h"
#include "kernels/common/panel.h"
#include "kernels/common/sparse_f32_kernel.h"
#define TT_DOT_BYTES 1
#include "kernels/common/sparse_plain.h"
#include "kernels/common/sparse_ymm.h"

namespace tautorch {
namespace {
constexpr int kKr = 4;
inline __m256i load_w(const int8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
inline __m256i madd(__m256i acc, __m256i x, __m256i w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
} // namespace
} // namespace tautorch

namespace tautorch {
namespace {
inline __m256i depthwise_madd(__m256i acc, __m256i x, __m256i w) { return madd(acc, x, w); }
} // namespace
} // namespace tautorch
#include "kernels/common/depthwise_vnni.h"

#define TT_PEAK_STEP "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm\\r"
#include "kernels/common/dot_ymm.h"

namespace tautorch {

const Isa isa_avxvnni = {
    "avxvnni",
    2,
    ActKind::u8_shifted,
    16,
    8,
    kKr,
    mr_of,
    dot_i8,
    dot_f32,
    rows_f32,
    amax,
    quantize,
    to_f32,
    epilogue,
    transpose_u8,
    panel_u8,
    transpose_32,
    sparse_i8,
    sparse_f32,
    kPlainOrder,
    peak_i8,
    peak_f32,
    depthwise,
};

} // namespace tautorch
