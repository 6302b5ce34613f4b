// 2:4 weights into the layout of wgmma.sp; see sparse_linear_cuda.h. Runs once per weight; not tuned.
#include "kernels/common/cuda_launch.cuh"
#include "kernels/sparse_linear/sparse_linear_cuda.h"

namespace tautorch::cuda {
namespace {

constexpr int kThreads = 128;

// A block per row, padding rows too.
__global__ void __launch_bounds__(kThreads) pack_wgmma(const int8_t *values, const uint8_t *places, int64_t n,
                                                       int64_t kept, WgmmaLayout l, uint8_t *packed) {
    const int64_t row = blockIdx.x;
    const bool real = row < n;
    if (real)
        for (int64_t i = threadIdx.x; i < l.ld; i += kThreads)
            packed[row * l.ld + i] = i < kept ? static_cast<uint8_t>(values[row * kept + i]) : 0;
    constexpr int kBytes = kWgmmaStep / 8;
    for (int64_t i = threadIdx.x; i < l.steps * kBytes; i += kThreads) {
        const uint8_t byte = real && i < kept / 4 ? places[row * (kept / 4) + i] : 0x44; // 0, 1, 0, 1
        packed[l.places_off + (i / kBytes * l.rows + row) * kBytes + i % kBytes] = byte;
    }
}

} // namespace

int wgmma_pack_sparse(const int8_t *values, const uint8_t *places, int64_t n, int64_t kept, uint8_t *packed,
                      void *stream) {
    const WgmmaLayout l = wgmma_layout(n, 2 * kept);
    if (n < 1 || kept < 1 || kept % 4 != 0 || l.rows >= int64_t{1} << 31 || !is_aligned(packed, 128))
        return kBadArgument;
    return launch_kernel(&pack_wgmma, static_cast<unsigned>(l.rows), kThreads, stream, values, places, n,
                         kept, l, packed);
}

} // namespace tautorch::cuda
