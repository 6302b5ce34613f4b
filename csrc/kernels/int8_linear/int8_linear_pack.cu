// Packing of weights whose rows do not start on 16 bytes, and the sum of each row.
#include "kernels/common/cuda_launch.cuh"
#include "kernels/int8_linear/int8_linear_cuda.h"

namespace tautorch::cuda {
namespace {

constexpr int kThreads = 128;

// One block per row. `to` null: the sum alone.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const int8_t *weight, int64_t stride_n, int64_t k, int8_t *to, int64_t ldw, int32_t *sums) {
    __shared__ int32_t warp_sum[kThreads / 32];
    const int64_t n = blockIdx.x;
    const int8_t *from = weight + n * stride_n;

    int32_t sum = 0;
    for (int64_t i = threadIdx.x; i < ldw; i += kThreads) {
        const int8_t w = i < k ? from[i] : int8_t{0};
        if (to != nullptr)
            to[n * ldw + i] = w;
        sum += w;
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (threadIdx.x % 32 == 0)
        warp_sum[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t total = 0;
        for (int w = 0; w < kThreads / 32; ++w)
            total += warp_sum[w];
        sums[n] = total;
    }
}

__global__ void header_kernel(PackHeader h, PackHeader *to) { *to = h; }

bool good(int64_t stride_n, int64_t n, int64_t k) {
    return n >= 1 && n < (int64_t{1} << 31) && k >= 0 && k <= kMaxK && stride_n >= 0;
}

} // namespace

int int8_linear_pack(const int8_t *weight, int64_t stride_n, int64_t n, int64_t k, uint8_t *packed,
                     void *stream) {
    if (!good(stride_n, n, k) || !is_aligned(packed, kLine))
        return kBadArgument;
    const PackHeader h = pack_header(n, k);
    const int status = launch_kernel(&header_kernel, 1, 1, stream, h, reinterpret_cast<PackHeader *>(packed));
    if (status != kOk)
        return status;
    return launch_kernel(&pack_kernel, static_cast<unsigned>(n), kThreads, stream, weight, stride_n, k,
                         reinterpret_cast<int8_t *>(packed + h.weight_off), h.ldw,
                         reinterpret_cast<int32_t *>(packed + h.sums_off));
}

int int8_linear_sums(const int8_t *weight, int64_t stride_n, int64_t n, int64_t k, int32_t *sums,
                     void *stream) {
    if (!good(stride_n, n, k) || !is_aligned(sums, 4))
        return kBadArgument;
    return launch_kernel(&pack_kernel, static_cast<unsigned>(n), kThreads, stream, weight, stride_n, k,
                         static_cast<int8_t *>(nullptr), k, sums);
}

} // namespace tautorch::cuda
