// Portable primitives: the same packing and drivers as the wide ones, in plain C++.
#define TT_LANES 4
#include "kernels/common/depthwise.h"
#include "kernels/common/epilogue.h"
#include "kernels/common/isa.h"
#include "kernels/common/panel.h"
#include "kernels/common/sparse_f32_kernel.h"
#include "kernels/common/sparse_plain.h"

namespace tautorch {
namespace {
constexpr int kVectorsF32 = 4;
} // namespace
} // namespace tautorch
#include "kernels/common/dot_f32.h"

namespace tautorch {
namespace {

int32_t mr_of(int32_t) { return 4; }

void dot_i8(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
            int width, int32_t *acc) {
    for (int r = 0; r < mr; ++r)
        for (int n = 0; n < width; ++n)
            acc[r * kTileN + n] = 0;
    for (int64_t t = 0; t < taps; ++t)
        for (int64_t q = 0; q < kq; ++q, panel += 2 * width)
            for (int r = 0; r < mr; ++r) {
                const int16_t *a = static_cast<const int16_t *>(rows[t * ld + r]) + 2 * q;
                for (int n = 0; n < width; ++n)
                    acc[r * kTileN + n] += a[0] * panel[2 * n] + a[1] * panel[2 * n + 1];
            }
}

template <class T> int64_t peak(int64_t rounds) {
    T acc[8] = {}, x = 3, w = 5;
    for (int64_t i = 0; i < rounds; ++i) {
        asm volatile("" : "+m"(x), "+m"(w));
        const T a = x, b = w;
        for (T &sum : acc)
            sum += a * b;
    }
    for (const T &sum : acc)
        asm volatile("" ::"m"(sum));
    return rounds * 8;
}

} // namespace

const Isa isa_scalar = {
    "scalar",
    0,
    ActKind::s16,
    16,
    8,
    2,
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
    sparse_i8_plain,
    sparse_f32,
    kPlainOrder,
    peak<int32_t>,
    peak<float>,
    depthwise,
};

} // namespace tautorch
