// The launch of a convolution by gemm_sm80.cuh, over dense or 2:4 weights.
#pragma once

#include "kernels/common/gemm_sm80.cuh"
#include "kernels/int8_conv2d/int8_conv2d_cuda.h"

namespace tautorch::cuda {

// A padded pixel counts as the zero point, so that the correction by the weights' sums holds at the edges
// too.
static __global__ void fill_outside(int8_t *to, const int32_t *zero_point) {
    to[threadIdx.x] = static_cast<int8_t>(*zero_point);
}

template <class Units, int kWarpsN, int kWarpsM, int kRowTiles, int kStages>
int run_conv2d(const Int8Conv2d &a, void *stream) {
    using Shape = GemmShape<Units, ImageRows, kWarpsN, kWarpsM, kRowTiles, kStages>;
    if (a.x_zero_point != nullptr) {
        const int status = launch_kernel(&fill_outside, 1, 16, stream, a.outside, a.x_zero_point);
        if (status != kOk)
            return status;
    }
    const GemmLayout l = gemm_layout(a.outputs, a.k(), Units::kPieces * 16);
    const auto i = [](int64_t v) { return static_cast<int>(v); };
    const int64_t pixels = a.out_height() * a.out_width();
    const ImageRows rows{a.x,
                         a.x_zero_point != nullptr ? a.outside : nullptr,
                         i(a.height),
                         i(a.width),
                         i(a.channels),
                         i(a.taps_h),
                         i(a.taps_w),
                         i(a.stride_h),
                         i(a.stride_w),
                         i(a.padding_h),
                         i(a.padding_w),
                         i(a.dilation_h),
                         i(a.dilation_w),
                         i(a.out_height()),
                         i(a.out_width()),
                         a.batch * pixels};
    const TileStore store{a.batch * pixels,
                          a.outputs,
                          a.x_scale,
                          a.x_scale_per_sample ? pixels : 0,
                          a.w_scale,
                          a.x_zero_point != nullptr ? a.sums : nullptr,
                          a.bias,
                          {a.x_zero_point, a.out_scale, a.out_zero_point, a.activation, a.out_dtype},
                          a.y,
                          a.ldy};
    return launch_gemm<Shape>({a.units, i(l.groups), i(l.steps)}, rows, store, stream);
}

} // namespace tautorch::cuda
