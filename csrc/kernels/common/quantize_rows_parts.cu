// The row quantiser for few, long rows, such as images: several blocks share a row. See quantize_rows_cuda.h.
//
// Three launches: the peaks are cleared, every block adds its part's to its row's by an integer maximum
// (which does not depend on who comes first), and every block rounds its part by the row's.
#include "kernels/common/cuda_launch.cuh"
#include "kernels/common/quantize_rows.cuh"

namespace tautorch::cuda {
namespace {

constexpr int kThreads = 256, kEach = 32; // elements of a thread
constexpr int64_t kPart = int64_t{kThreads} * kEach;

__global__ void __launch_bounds__(kThreads) clear_peaks(uint32_t *peaks, int64_t m) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row < m)
        peaks[row] = 0;
}

// Row and first element of this block's part.
struct Part {
    int64_t row, begin;
};
__device__ __forceinline__ Part part_of(unsigned parts) {
    return {blockIdx.x / parts, blockIdx.x % parts * kPart};
}

template <class T>
__global__ void __launch_bounds__(kThreads) peaks_kernel(const QuantizeRows a, unsigned parts) {
    constexpr int kWidth = Vec<T>::kSize;
    const Part p = part_of(parts);
    const T *x = static_cast<const T *>(a.x) + p.row * a.stride_m;
    uint32_t peak = 0;
#pragma unroll
    for (int c = 0; c < kEach / kWidth; ++c) {
        const int64_t i = p.begin + (c * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
        if (i >= a.k)
            break;
        const Vec<T> v = *reinterpret_cast<const Vec<T> *>(x + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
            peak = max(peak, __float_as_uint(to_float(v.v[j])) & 0x7fffffffu);
    }
    peak = __reduce_max_sync(0xffffffffu, peak);
    if (threadIdx.x % 32 == 0)
        atomicMax(a.peaks + p.row, peak);
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_parts_kernel(const QuantizeRows a, unsigned parts) {
    constexpr int kWidth = Vec<T>::kSize;
    const Part p = part_of(parts);
    const T *x = static_cast<const T *>(a.x) + p.row * a.stride_m;
    int8_t *q = a.q + p.row * a.ldq;
    const RowScale r = row_scale(a.x_scale, a.zero_point, a.peaks[p.row]);
    if (p.begin == 0 && threadIdx.x == 0)
        a.scale[p.row] = r.scale;
#pragma unroll
    for (int c = 0; c < kEach / kWidth; ++c) {
        const int64_t i = p.begin + (c * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
        if (i >= a.k)
            break;
        const Vec<T> v = *reinterpret_cast<const Vec<T> *>(x + i);
        Bytes<kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
            out.v[j] = quantize(to_float(v.v[j]), r);
        *reinterpret_cast<Bytes<kWidth> *>(q + i) = out;
    }
}

template <class T> int launch(const QuantizeRows &a, void *stream) {
    const auto parts = static_cast<unsigned>(div_up(a.k, kPart)), blocks = static_cast<unsigned>(a.m) * parts;
    const auto clearing = static_cast<unsigned>(div_up(a.m, kThreads));
    if (const int e = launch_kernel(&clear_peaks, clearing, kThreads, stream, a.peaks, a.m); e != kOk)
        return e;
    if (const int e = launch_kernel(&peaks_kernel<T>, blocks, kThreads, stream, a, parts); e != kOk)
        return e;
    return launch_kernel(&quantize_parts_kernel<T>, blocks, kThreads, stream, a, parts);
}

} // namespace

bool quantize_in_parts(const QuantizeRows &a) {
    // From 4 parts on, where a block a row would leave multiprocessors idle.
    constexpr int64_t kRows = 256;
    const int64_t size = size_of(a.dtype);
    return a.peaks != nullptr && a.m <= kRows && a.k > 3 * kPart && a.stride_k == 1 && is_aligned(a.x, 16) &&
           a.stride_m * size % 16 == 0 && a.k * size % 16 == 0 && a.m * div_up(a.k, kPart) < int64_t{1} << 31;
}

int quantize_rows_in_parts(const QuantizeRows &a, void *stream) {
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
