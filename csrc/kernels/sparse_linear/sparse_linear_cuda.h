// sparse_linear on CUDA. Single int8 weights: sparse_linear_bitmap_cuda.h. Pattern 2:4, int8 values: y as in
// int8_linear_cuda.h, by mma.sp.sync or, on compute capability 9.0, wgmma.sp. bf16 and fp16 values by rows of
// the same type: y = activation(sum x w + bias), summed in fp32 by mma.sp.sync.
#pragma once

#include "kernels/common/gemm_pack_cuda.h"
#include "kernels/sparse_linear/sparse_linear_bitmap_cuda.h"

namespace tautorch::cuda {

// X(name, warps along the outputs (64 each), warps along the rows, tiles of 8 rows a warp, stages)
#define TAUTORCH_SPARSE_LINEAR_24(X)                                                                         \
    X(sp24_128x64, 2, 2, 4, 5)                                                                               \
    X(sp24_256x128, 4, 2, 8, 5)
// Of bf16 and fp16, an instance each.
#define TAUTORCH_SPARSE_LINEAR_24_FLOAT(X)                                                                   \
    X(sp24_float_128x64, 2, 2, 4, 5)                                                                         \
    X(sp24_float_256x128, 4, 2, 8, 5)

// CUTLASS's for 9.0, each for outputs of 1, 2 and 4 bytes. B, here the rows of x, goes through shared memory
// once for 64 outputs: 256 rows a tile keep that at the rate of the tensor cores. X(name, tile m, n, k,
// cluster m, n)
#define TAUTORCH_SPARSE_LINEAR_24_SM90A(X) X(sm90a_sp24_256x128x128, 256, 128, 128, 1, 2)

// Weights as wgmma.sp reads them: values int8 [n, ld], zero from the kept values on | places uint8
// [steps of 128][n to 64][16], 4 of 2 bits each, places 0 and 1 where there are no values | sums int32 [n].
// Parts start on lines of 128 bytes.
constexpr int kWgmmaRows = 64, kWgmmaStep = 128;
struct WgmmaLayout {
    int64_t ld, steps, rows, places_off, sums_off, total;
};
inline WgmmaLayout wgmma_layout(int64_t n, int64_t k) {
    WgmmaLayout l{};
    l.ld = round_up(round_up(k, 8) / 2, 16);
    l.steps = div_up(k, kWgmmaStep);
    l.rows = round_up(n, kWgmmaRows);
    l.places_off = round_up(n * l.ld, 128);
    l.sums_off = l.places_off + l.steps * l.rows * (kWgmmaStep / 8);
    l.total = l.sums_off + round_up(4 * n, 128);
    return l;
}
// As gemm_pack_sparse(), into wgmma_layout(n, 2 * kept).
int wgmma_pack_sparse(const int8_t *values, const uint8_t *places, int64_t n, int64_t kept, uint8_t *packed,
                      void *stream);

// What a kernel reads: units of gemm_pack_sparse(), wgmma_pack_sparse()'s, units of gemm_pack_sparse_float(),
// bitmap_layout()'s.
enum class SparseOrder { units, wgmma, float_units, bitmap };

struct SparseLinearKernel {
    const char *name;
    int min_capability, max_capability; // major * 10 + minor, inclusive
    int tile_n, tile_m;
    SparseOrder order;
    int (*run)(const Int8Linear &, void *stream);
};

// The table, in order of preference. *count is set to its length.
const SparseLinearKernel *sparse_linear_kernels(int *count);
const SparseLinearKernel *sparse_linear_find(const char *name);
// Null when the kernel can run the problem on a device of this capability, else the reason (static). x_dtype:
// i8 for int8 values, whatever is quantised to meet them.
const char *sparse_linear_supports(const SparseLinearKernel &kernel, int capability, int64_t m, int64_t n,
                                   int64_t k, DType x_dtype);
// Of 2:4. Null when none should run it. All that are chosen for one type on one device read the same layout.
const SparseLinearKernel *sparse_linear_choose(int capability, int multiprocessors, int64_t m, int64_t n,
                                               int64_t k, DType x_dtype);

// Of single weights, by bitmaps: all read the same layout.
const SparseLinearKernel *sparse_linear_bitmap(int64_t m);

// a.weight: in the kernel's order; a.ldw unused, of float values also sums and scales; a.k: twice the kept
// values of a row, or up to 7 less. What lies behind a row of floats is not read.
int sparse_linear_run(const SparseLinearKernel &kernel, const Int8Linear &a, void *stream);

} // namespace tautorch::cuda
