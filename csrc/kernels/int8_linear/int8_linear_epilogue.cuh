// The epilogue as CUTLASS's visitor trees call it: the shared arithmetic on their arrays.
#pragma once

#include "cutlass/array.h"
#include "kernels/common/finish.cuh"
#include "kernels/int8_linear/int8_linear_cuda.h"

namespace tautorch::cuda {

// Out is a container of the output's size: int32_t (fp32, int32), uint16_t (bf16, fp16) or int8_t.
template <class Out> class FinishArray : public Finish<Out> {
  public:
    using Finish<Out>::Finish;

    template <int N>
    __device__ __forceinline__ cutlass::Array<Out, N>
    operator()(const cutlass::Array<int32_t, N> &acc, const cutlass::Array<float, N> &x_scale,
               const cutlass::Array<float, N> &w_scale, const cutlass::Array<int32_t, N> &sums,
               const cutlass::Array<float, N> &bias) const {
        cutlass::Array<Out, N> out;
        this->template integers<N>(acc, x_scale, w_scale, sums, bias, out);
        return out;
    }
};

} // namespace tautorch::cuda
