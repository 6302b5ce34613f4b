// Where an Int8Linear's sums go.
#pragma once

#include "kernels/common/tile_store.cuh"
#include "kernels/int8_linear/int8_linear_cuda.h"

namespace tautorch::cuda {

#ifdef __CUDACC__
__host__
#endif
    __device__ __forceinline__ TileStore tile_store(const Int8Linear &a) {
    return {a.m,       a.n,
            a.x_scale, a.x_scale_per_row ? 1 : 0,
            a.w_scale, a.x_zero_point != nullptr ? a.sums : nullptr,
            a.bias,    {a.x_zero_point, a.out_scale, a.out_zero_point, a.activation, a.out_dtype},
            a.y,       a.ldy};
}

} // namespace tautorch::cuda
