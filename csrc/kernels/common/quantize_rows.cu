// See quantize_rows_cuda.h for the contract.
//
// A row is read twice: for its largest magnitude, then for rounding; the second reading comes out of cache (a
// row of 4096 bf16 is 8 KB). Magnitudes are compared as bits: for non-negative floats that is the same order,
// and NaN and Inf come out on top, so one integer maximum finds both the amax and the rows to poison.
#include "kernels/common/cuda_launch.cuh"
#include "kernels/common/quantize_rows.cuh"

namespace tautorch::cuda {
namespace {

constexpr int kThreads = 256;
// kRowThreads threads per row: 32 (one warp, kThreads / 32 rows per block) or kThreads (one row per block).
// kVector: 16-byte loads; needs stride_k 1 and 16-byte aligned rows.
template <class T, int kRowThreads, bool kVector>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const QuantizeRows a) {
    constexpr int kRowsPerBlock = kThreads / kRowThreads;
    constexpr int kWidth = Vec<T>::kSize;
    __shared__ uint32_t warp_peak[kThreads / 32];

    const int lane = threadIdx.x % kRowThreads;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kRowThreads;
    // Whole warps leave together (a row is one warp or the whole block), so the collectives below are never
    // divergent.
    if (row >= a.m)
        return;
    const T *x = static_cast<const T *>(a.x) + row * a.stride_m;
    int8_t *q = a.q + row * a.ldq;
    const int64_t vectors = kVector ? a.k / kWidth : 0;

    uint32_t peak = 0;
    const auto look = [&](T v) { peak = max(peak, __float_as_uint(to_float(v)) & 0x7fffffffu); };
    for (int64_t i = lane; i < vectors; i += kRowThreads) {
        const Vec<T> v = reinterpret_cast<const Vec<T> *>(x)[i];
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
            look(v.v[j]);
    }
    for (int64_t i = vectors * kWidth + lane; i < a.k; i += kRowThreads)
        look(x[i * a.stride_k]);

    peak = __reduce_max_sync(0xffffffffu, peak);
    if constexpr (kRowThreads > 32) {
        if (threadIdx.x % 32 == 0)
            warp_peak[threadIdx.x / 32] = peak;
        __syncthreads();
        peak = 0;
#pragma unroll
        for (int w = 0; w < kThreads / 32; ++w)
            peak = max(peak, warp_peak[w]);
    }

    const RowScale r = row_scale(a.x_scale, a.zero_point, peak);
    if (lane == 0)
        a.scale[row] = r.scale;

    for (int64_t i = lane; i < vectors; i += kRowThreads) {
        const Vec<T> v = reinterpret_cast<const Vec<T> *>(x)[i];
        Bytes<kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
            out.v[j] = quantize(to_float(v.v[j]), r);
        reinterpret_cast<Bytes<kWidth> *>(q)[i] = out;
    }
    for (int64_t i = vectors * kWidth + lane; i < a.k; i += kRowThreads) {
        q[i] = quantize(to_float(x[i * a.stride_k]), r);
    }
}

template <class T, int kRowThreads, bool kVector> int launch(const QuantizeRows &a, void *stream) {
    constexpr int kRowsPerBlock = kThreads / kRowThreads;
    const auto blocks = static_cast<unsigned>((a.m + kRowsPerBlock - 1) / kRowsPerBlock);
    return launch_kernel(&quantize_rows_kernel<T, kRowThreads, kVector>, blocks, kThreads, stream, a);
}

template <class T> int launch(const QuantizeRows &a, void *stream) {
    const bool vector = a.stride_k == 1 && is_aligned(a.x, 16) && a.stride_m * int64_t{sizeof(T)} % 16 == 0;
    // A warp has 32 lanes of 16 bytes in flight; four rounds of that still beat a block-wide reduction.
    const bool narrow = a.k * int64_t{sizeof(T)} <= 4 * 32 * 16;
    if (vector)
        return narrow ? launch<T, 32, true>(a, stream) : launch<T, kThreads, true>(a, stream);
    return narrow ? launch<T, 32, false>(a, stream) : launch<T, kThreads, false>(a, stream);
}

} // namespace

int quantize_rows(const QuantizeRows &a, void *stream) {
    constexpr int64_t kMax = (int64_t{1} << 31) - 1;
    if (a.m < 0 || a.m > kMax || a.k < 0 || a.k > kMax || a.ldq < a.k || a.ldq % 16 != 0)
        return kBadArgument;
    if (a.m == 0)
        return kOk;
    if (!is_aligned(a.q, 16))
        return kBadArgument;
    if (quantize_in_parts(a))
        return quantize_rows_in_parts(a, stream);
    switch (a.dtype) {
    case DType::f32:
        return launch<float>(a, stream);
    case DType::bf16:
        return launch<__nv_bfloat16>(a, stream);
    case DType::f16:
        return launch<__half>(a, stream);
    default:
        return kBadArgument;
    }
}

} // namespace tautorch::cuda
