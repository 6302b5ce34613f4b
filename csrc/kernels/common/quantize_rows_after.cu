// The row quantiser behind a norm, a gate or an activation; see quantize_rows_cuda.h.
//
// A row is a block. Its values are read once, 16 bytes at a time, and stay in registers as fp32 through the
// sums of the norm, the largest magnitude and the rounding.
#include "kernels/common/cuda_launch.cuh"
#include "kernels/common/quantize_rows.cuh"

namespace tautorch::cuda {
namespace {

struct alignas(16) Four32 {
    float v[4];
};

// Sum of v over the block, the same in every thread and in every run. partial: one value per warp, of this
// sum alone. Every thread of the block calls it.
template <int kThreads> __device__ __forceinline__ float block_sum(float v, float *partial) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        v += __shfl_xor_sync(0xffffffffu, v, step);
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0.f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w)
        v += partial[w];
    return v;
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.f + expf(-v)); }

template <class T, int kThreads, int kHeld>
__global__ void __launch_bounds__(kThreads) quantize_after_kernel(const QuantizeRowsAfter a) {
    constexpr int kWidth = Vec<T>::kSize, kChunks = kHeld / kWidth;
    __shared__ float sums[kThreads / 32], squares[kThreads / 32];
    __shared__ uint32_t peaks[kThreads / 32];
    const int64_t row = blockIdx.x;
    const int k = static_cast<int>(a.rows.k);
    const T *x = static_cast<const T *>(a.rows.x) + row * a.rows.stride_m;
    const T *gate = static_cast<const T *>(a.gate) + row * a.gate_stride_m;
    // Where chunk c of this thread begins; it is whole or past the end.
    const auto at = [&](int c) { return (c * kThreads + static_cast<int>(threadIdx.x)) * kWidth; };

    float held[kChunks][kWidth];
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        Vec<T> v{}, g{};
        if (at(c) < k) {
            v = *reinterpret_cast<const Vec<T> *>(x + at(c));
            if (a.stage == RowStage::silu_gate)
                g = *reinterpret_cast<const Vec<T> *>(gate + at(c));
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            float y = to_float(v.v[j]);
            if (a.stage == RowStage::rms_norm)
                sum += y * y;
            else if (a.stage == RowStage::layer_norm)
                sum += y;
            else if (a.stage == RowStage::silu_gate)
                y *= silu(to_float(g.v[j]));
            else if (a.stage == RowStage::gelu)
                y = 0.5f * y * (1.f + erff(y * 0.7071067811865476f));
            else if (a.stage == RowStage::gelu_tanh)
                y *= __fdividef(1.f, 1.f + expf(-1.5957691216057308f * (y + 0.044715f * y * y * y)));
            held[c][j] = y;
        }
    }

    if (a.stage == RowStage::rms_norm || a.stage == RowStage::layer_norm) {
        const bool centred = a.stage == RowStage::layer_norm;
        sum = block_sum<kThreads>(sum, sums);
        const float mean = centred ? __fdiv_rn(sum, static_cast<float>(k)) : 0.f;
        if (centred) { // in a second pass over the registers: no cancellation
            float square = 0.f;
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
                if (at(c) < k) {
#pragma unroll
                    for (int j = 0; j < kWidth; ++j)
                        square += (held[c][j] - mean) * (held[c][j] - mean);
                }
            sum = block_sum<kThreads>(square, squares);
        }
        const float inv = __fdiv_rn(1.f, __fsqrt_rn(__fdiv_rn(sum, static_cast<float>(k)) + a.eps));
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            if (at(c) >= k)
                continue; // zeros stay zeros
#pragma unroll
            for (int j = 0; j < kWidth; j += 4) {
                Four32 w{{1.f, 1.f, 1.f, 1.f}}, b{};
                if (a.weight != nullptr)
                    w = *reinterpret_cast<const Four32 *>(a.weight + at(c) + j);
                if (a.bias != nullptr)
                    b = *reinterpret_cast<const Four32 *>(a.bias + at(c) + j);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    held[c][j + i] = (held[c][j + i] - mean) * inv * w.v[i] + b.v[i];
            }
        }
    }

    uint32_t peak = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
            peak = max(peak, __float_as_uint(held[c][j]) & 0x7fffffffu);
    peak = __reduce_max_sync(0xffffffffu, peak);
    if (threadIdx.x % 32 == 0)
        peaks[threadIdx.x / 32] = peak;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w)
        peak = max(peak, peaks[w]);

    const RowScale r = row_scale(a.rows.x_scale, a.rows.zero_point, peak);
    if (threadIdx.x == 0)
        a.rows.scale[row] = r.scale;
    int8_t *q = a.rows.q + row * a.rows.ldq;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        if (at(c) >= k)
            continue;
        Bytes<kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
            out.v[j] = quantize(held[c][j], r);
        *reinterpret_cast<Bytes<kWidth> *>(q + at(c)) = out;
    }
}

template <class T> int launch(const QuantizeRowsAfter &a, void *stream) {
    const auto blocks = static_cast<unsigned>(a.rows.m);
    if (a.rows.k <= 128 * 8)
        return launch_kernel(&quantize_after_kernel<T, 128, 8>, blocks, 128, stream, a);
    if (a.rows.k <= 256 * 8)
        return launch_kernel(&quantize_after_kernel<T, 256, 8>, blocks, 256, stream, a);
    if (a.rows.k <= 256 * 16)
        return launch_kernel(&quantize_after_kernel<T, 256, 16>, blocks, 256, stream, a);
    if (a.rows.k <= 256 * 32)
        return launch_kernel(&quantize_after_kernel<T, 256, 32>, blocks, 256, stream, a);
    return launch_kernel(&quantize_after_kernel<T, 256, 64>, blocks, 256, stream, a);
}

} // namespace

int quantize_rows_after(const QuantizeRowsAfter &a, void *stream) {
    constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;
    const QuantizeRows &r = a.rows;
    if (r.m < 0 || r.m > kMaxRows || r.k < 1 || r.k > kMaxHeld || r.stride_k != 1 || r.ldq < r.k ||
        r.ldq % 16 != 0 || a.stage < RowStage::none || a.stage > RowStage::gelu_tanh)
        return kBadArgument;
    const int64_t size = size_of(r.dtype);
    const bool gated = a.stage == RowStage::silu_gate;
    if (r.k * size % 16 != 0 || r.stride_m * size % 16 != 0 || !is_aligned(r.x, 16) || !is_aligned(r.q, 16) ||
        !is_aligned(a.weight, 16) || !is_aligned(a.bias, 16) || gated != (a.gate != nullptr) ||
        !is_aligned(a.gate, 16) || a.gate_stride_m * size % 16 != 0)
        return kBadArgument;
    if (r.m == 0)
        return kOk;
    switch (r.dtype) {
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
