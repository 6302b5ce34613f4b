// The arithmetic after the sums, shared by every CUDA kernel: scales, bias, activation, conversion.
//
// One instantiation per output size, not per output type: the type, the activation and the zero points are
// uniform run-time values, so their branches do not diverge, and the kernels stay few.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/common/dtype.h"

namespace tautorch::cuda {

struct FinishArguments {
    const int32_t *x_zero_point = nullptr;
    const float *out_scale = nullptr;
    const int32_t *out_zero_point = nullptr;
    Activation activation = Activation::none;
    DType out_dtype = DType::f32;
};

// Out is a container of the output's size: int32_t (fp32, int32), uint16_t (bf16, fp16) or int8_t.
template <class Out> class Finish {
  public:
    Finish() = default;
    // Reads the scalars once per output tile.
    __device__ explicit Finish(const FinishArguments &a)
        : activation_(a.activation), out_dtype_(a.out_dtype) {
        x_zero_point_ = a.x_zero_point ? *a.x_zero_point : 0;
        out_zero_point_ = a.out_zero_point ? *a.out_zero_point : 0;
        inv_out_scale_ = a.out_scale ? __fdiv_rn(1.f, *a.out_scale) : 1.f;
    }

    // Integer sums: out[i] of acc[i], scales, sums of the weights' rows and bias. Anything with [] will do.
    template <int N, class Sums32, class Floats, class Array>
    __device__ __forceinline__ void integers(const Sums32 &acc, const Floats &x_scale, const Floats &w_scale,
                                             const Sums32 &sums, const Floats &bias, Array &out) const {
        float y[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int32_t a = acc[i] - x_zero_point_ * sums[i];
            if constexpr (sizeof(Out) == 4)
                out[i] = a;
            // No contraction: int8 outputs must round as they do elsewhere.
            y[i] = __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(a), x_scale[i]), w_scale[i]), bias[i]);
        }
        if constexpr (sizeof(Out) == 4) {
            if (out_dtype_ == DType::i32)
                return;
        }
        floats(y, out);
    }

    // What comes after scales and bias.
    template <int N, class Array> __device__ __forceinline__ void floats(float (&y)[N], Array &out) const {
        activate(y);
        if constexpr (sizeof(Out) == 4) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                out[i] = __float_as_int(y[i]);
        } else if constexpr (sizeof(Out) == 2) {
            if (out_dtype_ == DType::bf16) {
#pragma unroll
                for (int i = 0; i < N; ++i)
                    out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(y[i]));
            } else {
#pragma unroll
                for (int i = 0; i < N; ++i)
                    out[i] = __half_as_ushort(__float2half_rn(y[i]));
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i)
                out[i] = requantize(y[i]);
        }
    }

  private:
    template <int N> __device__ __forceinline__ void activate(float (&y)[N]) const {
        if (activation_ == Activation::none)
            return;
        if (activation_ == Activation::relu) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                y[i] = y[i] < 0.f ? 0.f : y[i]; // keeps NaN
        } else if (activation_ == Activation::gelu) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                y[i] = 0.5f * y[i] * (1.f + erff(y[i] * 0.7071067811865476f));
        } else {
            // 0.5 * (1 + tanh(u)) = sigmoid(2 u), so gelu_tanh and silu are y * sigmoid(t).
            const bool tanh = activation_ == Activation::gelu_tanh;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float cubic = 1.5957691216057308f * (y[i] + 0.044715f * y[i] * y[i] * y[i]);
                const float t = tanh ? cubic : y[i];
                // __fdividef gives 0 for divisors past 2^126, where the quotient is under 1e-36 anyway.
                y[i] = __fdividef(y[i], 1.f + expf(-t));
            }
        }
    }

    __device__ __forceinline__ int8_t requantize(float y) const {
        float v = __fmul_rn(y, inv_out_scale_);
        v = v != v ? 0.f : fminf(fmaxf(v, -512.f), 512.f);
        return static_cast<int8_t>(min(max(__float2int_rn(v) + out_zero_point_, -128), 127));
    }

    int32_t x_zero_point_;
    int32_t out_zero_point_;
    float inv_out_scale_;
    Activation activation_;
    DType out_dtype_;
};

} // namespace tautorch::cuda
