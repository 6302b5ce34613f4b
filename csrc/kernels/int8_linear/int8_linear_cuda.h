// int8_linear on CUDA: y[M, N] = activation(acc * x_scale[m] * w_scale[n] + bias[n]), with
// acc = sum_k (x[m, k] - x_zero_point) * w[n, k] in int32, exact for k <= kMaxK.
//
// Nothing here knows torch or Python: raw device pointers, sizes, and a stream as void*. Every launcher is
// asynchronous, allocates nothing, and can be captured in a CUDA graph. All pointers
// belong to the current device.
#pragma once

#include "kernels/common/cuda_status.h"

namespace tautorch::cuda {

// ---- weights ----
//
// The kernels read canonical int8 [n, k] rows as they are, if every row starts on 16 bytes (TMA and 16-byte
// cp.async want that). Other weights are packed, once, into one uint8 block:
//     header | w int8 [n, ldw], k..ldw zero | sums int32 [n]          each part on a line of 128 bytes
// sums[n] = sum_k w[n, k] corrects a zero point of x: sum_k (x - z) w = sum_k x w - z * sum_k w.
// The header lets a file or a test recognise the block. Launchers take sizes from the caller instead, because
// reading it would wait for the device.
constexpr int64_t kLine = 128;
constexpr uint32_t kPackMagic = 0x50475454; // "TTGP"
constexpr int32_t kPackVersion = 1;

struct PackHeader {
    uint32_t magic;
    int32_t version;
    int64_t n, k, ldw;
    int64_t weight_off, sums_off, total; // bytes
};

inline PackHeader pack_header(int64_t n, int64_t k) {
    PackHeader h{kPackMagic, kPackVersion, n, k, 0, 0, 0, 0};
    h.ldw = round_up(k, 16);
    h.weight_off = kLine;
    h.sums_off = h.weight_off + round_up(n * h.ldw, kLine);
    h.total = h.sums_off + round_up(n * 4, kLine);
    return h;
}

// weight: int8 [n, k], stride_n elements between rows, unit stride within; any alignment.
// packed: pack_header(n, k).total bytes, 128-byte aligned.
int int8_linear_pack(const int8_t *weight, int64_t stride_n, int64_t n, int64_t k, uint8_t *packed,
                     void *stream);
// The sums alone, into int32 [n].
int int8_linear_sums(const int8_t *weight, int64_t stride_n, int64_t n, int64_t k, int32_t *sums,
                     void *stream);

// ---- the product ----

struct Int8Linear {
    int64_t m, n, k;               // within what int8_linear_supports() says
    const void *x;                 // [m, ldx] of x_dtype, 16-byte aligned; k..ldx is read but does not count
    int64_t ldx;                   // at least k; rows start on 16 bytes
    DType x_dtype;                 // i8; bf16 or f16 for the weight-only kernels
    const int8_t *weight;          // [n, ldw], 16-byte aligned; k..ldw is zero
    int64_t ldw;                   // multiple of 16, at least k
    const int32_t *sums;           // [n]; used with x_zero_point only
    const float *x_scale;          // 1 value, or m where x_scale_per_row; unused for int32 output, float x
    bool x_scale_per_row;          //
    const float *w_scale;          // [n]; unused for int32 output
    const float *bias;             // [n], or null
    const int32_t *x_zero_point;   // 1 value, or null for 0
    const float *out_scale;        // 1 value; int8 output only
    const int32_t *out_zero_point; // 1 value, or null for 0; int8 output only
    Activation activation;
    DType out_dtype; // any; int32: the accumulators, of int8 x only
    void *y;         // [m, ldy], 16-byte aligned; columns n..ldy may be overwritten up to the next 16 bytes
    int64_t ldy;     // at least n; ldy * size_of(out_dtype) is a multiple of 16
    void *workspace; // int8_linear_kernel_workspace() bytes on 128; they need not be cleared
    int64_t workspace_bytes;
};

enum class Int8LinearKind {
    tile,        // CUTLASS, for many rows
    stream,      // weights go once through shared memory at the rate of memory, for few rows
    weight_only, // the same for bf16 and fp16 rows
};

// One kernel of the table: a tile configuration for one architecture.
struct Int8LinearKernel {
    const char *name;
    int min_capability, max_capability; // major * 10 + minor, inclusive
    int tile_m, tile_n, tile_k;
    int cluster_m, cluster_n; // tiles that are made together, along rows and outputs
    Int8LinearKind kind;
    bool splits_k; // several blocks may make one tile, adding their sums in the workspace
    int (*run)(const Int8Linear &, void *stream);
    int64_t (*workspace)(const Int8Linear &, int multiprocessors); // null: needs none
};

// The table, in order of preference. *count is set to its length.
const Int8LinearKernel *int8_linear_kernels(int *count);
const Int8LinearKernel *int8_linear_find(const char *name);

// Null when the kernel can run the problem on a device of this capability, else the reason (static).
// weight_only: x_dtype is of rows that must not be quantised.
const char *int8_linear_supports(const Int8LinearKernel &kernel, int capability, int64_t m, int64_t n,
                                 int64_t k, bool weight_only, DType x_dtype);

// The kernel for a problem: a pure function of its arguments. Null when none should run it.
const Int8LinearKernel *int8_linear_choose(int capability, int multiprocessors, int64_t m, int64_t n,
                                           int64_t k, bool weight_only, DType x_dtype);

// Bytes of Int8Linear::workspace; of args m, n, k and out_dtype count.
int64_t int8_linear_kernel_workspace(const Int8LinearKernel &kernel, const Int8Linear &args,
                                     int multiprocessors);

int int8_linear_run(const Int8LinearKernel &kernel, const Int8Linear &args, void *stream);

} // namespace tautorch::cuda
