// What the row quantisers share: a row's scale from its largest magnitude, and rounding. Every step is one
// IEEE operation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/common/quantize_rows_cuda.h"

namespace tautorch::cuda {

constexpr uint32_t kInfBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fffffffu;
constexpr float kTiny = 0x1p-100f;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

// 16 bytes of T.
template <class T> struct alignas(16) Vec {
    static constexpr int kSize = 16 / sizeof(T);
    T v[kSize];
};

template <int kWidth> struct alignas(kWidth) Bytes {
    int8_t v[kWidth];
};

// What multiplies a row and what is added: one set per row.
struct RowScale {
    float scale, inv;
    int zero_point;
    bool is_static;
    bool poisoned;
};

__device__ __forceinline__ int8_t quantize(float v, const RowScale &r) {
    if (r.poisoned)
        return static_cast<int8_t>(r.zero_point);
    const float scaled = __fmul_rn(v, r.inv);
    if (r.is_static) {
        // Clamped first, far outside int8 even after the zero point, so that the sum cannot overflow.
        const int q = __float2int_rn(fminf(fmaxf(scaled, -512.f), 512.f)) + r.zero_point;
        return static_cast<int8_t>(min(max(q, -128), 127));
    }
    return static_cast<int8_t>(__float2int_rn(fminf(fmaxf(scaled, -127.f), 127.f)));
}

// peak: the largest magnitude of the row as bits, NaN and Inf on top.
__device__ __forceinline__ RowScale row_scale(const float *x_scale, const int32_t *zero_point,
                                              uint32_t peak) {
    RowScale r;
    r.is_static = x_scale != nullptr;
    r.zero_point = r.is_static && zero_point != nullptr ? *zero_point : 0;
    r.poisoned = peak >= kInfBits;
    const float amax = __uint_as_float(peak);
    if (r.is_static) {
        r.scale = *x_scale;
        r.inv = __fdiv_rn(1.f, r.scale);
    } else if (amax < kTiny) {
        r.scale = 1.f;
        r.inv = 0.f;
    } else {
        r.scale = __fdiv_rn(amax, 127.f);
        r.inv = __fdiv_rn(127.f, amax);
    }
    if (r.poisoned)
        r.scale = __uint_as_float(kNanBits);
    return r;
}

} // namespace tautorch::cuda
