// int8_conv2d on CUDA: an implicit product over the windows of a channels-last image, by mma.sync.
//   y[b, oh, ow, o] = activation(acc * x_scale[b] * w_scale[o] + bias[o])
//   acc = sum over taps and channels of (x - x_zero_point) * w; outside the image x is x_zero_point
#pragma once

#include "kernels/common/gemm_pack_cuda.h"

namespace tautorch::cuda {

// X(name, warps along the outputs (64 each), warps along the pixels, tiles of 8 pixels a warp, stages)
#define TAUTORCH_INT8_CONV2D(X)                                                                              \
    X(conv_64x128, 1, 4, 4, 5)                                                                               \
    X(conv_128x64, 2, 2, 4, 5)                                                                               \
    X(conv_128x128, 2, 2, 8, 5)

struct Int8Conv2d {
    int64_t batch, height, width, channels; // of x; channels a multiple of 16
    int64_t outputs;
    int64_t taps_h, taps_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    const int8_t *x;             // [batch, height, width, channels], 16-byte aligned
    const uint8_t *units;        // gemm_pack_dense() of [outputs, taps_h * taps_w * channels]; 2:4: _sparse()
    const int32_t *sums;         // [outputs]; used with x_zero_point only
    const float *x_scale;        // 1 value, or one a sample; unused for int32 output
    bool x_scale_per_sample;     //
    const float *w_scale;        // [outputs]
    const float *bias;           // [outputs], or null
    const int32_t *x_zero_point; // 1 value, or null for 0
    int8_t *outside;             // 16 bytes on 16 that are overwritten; used with x_zero_point only
    const float *out_scale;      // 1 value; int8 output only
    const int32_t *out_zero_point;
    Activation activation;
    DType out_dtype;
    void *y;     // [batch, out height, out width, ldy], 16-byte aligned
    int64_t ldy; // at least outputs; ldy * size_of(out_dtype) is a multiple of 16

    int64_t out_height() const {
        return (height + 2 * padding_h - dilation_h * (taps_h - 1) - 1) / stride_h + 1;
    }
    int64_t out_width() const {
        return (width + 2 * padding_w - dilation_w * (taps_w - 1) - 1) / stride_w + 1;
    }
    int64_t k() const { return taps_h * taps_w * channels; }
};

struct Int8Conv2dKernel {
    const char *name;
    int tile_n, tile_m;
    int (*run)(const Int8Conv2d &, void *stream);
};

const Int8Conv2dKernel *int8_conv2d_kernels(int *count);
const Int8Conv2dKernel *int8_conv2d_find(const char *name);
// Null when the kernels can run a layer on a device of this capability, else the reason (static).
// channels: of one group.
const char *int8_conv2d_supports(int capability, int64_t groups, int64_t channels, int64_t outputs,
                                 int64_t taps);
// The fastest by an estimate, for m output pixels in all: operands arriving from L2 at 48 bytes a cycle, of
// which weights take `share`, or `rate` multiply-adds a cycle, times the rounds of tiles over the
// multiprocessors. To be replaced by measurements.
const Int8Conv2dKernel *conv2d_fastest(const Int8Conv2dKernel *table, int count, double rate, double share,
                                       int multiprocessors, int64_t m, int64_t outputs);
const Int8Conv2dKernel *int8_conv2d_choose(int multiprocessors, int64_t m, int64_t outputs);

int int8_conv2d_run(const Int8Conv2dKernel &kernel, const Int8Conv2d &a, void *stream);

} // namespace tautorch::cuda
