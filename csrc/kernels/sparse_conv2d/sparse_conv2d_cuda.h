// sparse_conv2d on CUDA, pattern 2:4 with int8 values, windows of one pixel: y as in int8_conv2d_cuda.h, by
// mma.sp.sync. Over larger windows the canonical groups of 4 run along taps, which lie apart in a
// channels-last image.
#pragma once

#include "kernels/int8_conv2d/int8_conv2d_cuda.h"

namespace tautorch::cuda {

// X(name, warps along the outputs (64 each), warps along the pixels, tiles of 8 pixels a warp, stages)
#define TAUTORCH_SPARSE_CONV2D_24(X)                                                                         \
    X(conv24_64x128, 1, 4, 4, 5)                                                                             \
    X(conv24_128x64, 2, 2, 4, 5)                                                                             \
    X(conv24_256x128, 4, 2, 8, 5)

const Int8Conv2dKernel *sparse_conv2d_kernels(int *count);
const Int8Conv2dKernel *sparse_conv2d_find(const char *name);
// As int8_conv2d_supports().
const char *sparse_conv2d_supports(int capability, int64_t groups, int64_t channels, int64_t outputs,
                                   int64_t taps);
const Int8Conv2dKernel *sparse_conv2d_choose(int multiprocessors, int64_t m, int64_t outputs);

} // namespace tautorch::cuda
