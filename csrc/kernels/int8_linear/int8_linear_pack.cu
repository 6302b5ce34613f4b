// Packing: rows padded to 16 bytes with zeros, and the sum of each row, which corrects a zero point of x:
// sum_k (x - z) w = sum_k x w - z * sum_k w.
#include <cuda_runtime.h>

#include "kernels/int8_linear/int8_linear_cuda.h"

namespace tautorch::cuda {
namespace {

constexpr int kThreads = 128;

// One block per row.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const int8_t *weight, int64_t stride_n, PackHeader h, uint8_t *packed) {
    __shared__ int32_t warp_sum[kThreads / 32];
    const int64_t n = blockIdx.x;
    const int8_t *from = weight + n * stride_n;
    int8_t *to = reinterpret_cast<int8_t *>(packed + h.weight_off) + n * h.ldw;

    int32_t sum = 0;
    for (int64_t k = threadIdx.x; k < h.ldw; k += kThreads) {
        const int8_t w = k < h.k ? from[k] : int8_t{0};
        to[k] = w;
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
        reinterpret_cast<int32_t *>(packed + h.sums_off)[n] = total;
        if (n == 0)
            *reinterpret_cast<PackHeader *>(packed) = h;
    }
}

} // namespace

int int8_linear_pack(const int8_t *weight, int64_t stride_n, int64_t n, int64_t k, uint8_t *packed,
                     void *stream) {
    if (n < 1 || n >= (int64_t{1} << 31) || k < 0 || k > kMaxK || stride_n < 0 || !is_aligned(packed, kLine))
        return kBadArgument;
    const PackHeader h = pack_header(n, k);
    pack_kernel<<<static_cast<unsigned>(n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        weight, stride_n, h, packed);
    return static_cast<int>(cudaGetLastError());
}

} // namespace tautorch::cuda
