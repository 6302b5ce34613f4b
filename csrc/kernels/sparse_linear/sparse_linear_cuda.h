// sparse_linear on CUDA, pattern 2:4 with int8 values: y as in int8_linear_cuda.h, by mma.sp.sync.
#pragma once

#include "kernels/common/gemm_pack_cuda.h"
#include "kernels/int8_linear/int8_linear_cuda.h"

namespace tautorch::cuda {

// X(name, warps along the outputs (64 each), warps along the rows, tiles of 8 rows a warp, stages)
#define TAUTORCH_SPARSE_LINEAR_24(X)                                                                         \
    X(sp24_128x64, 2, 2, 4, 5)                                                                               \
    X(sp24_256x128, 4, 2, 8, 5)

struct SparseLinearKernel {
    const char *name;
    int tile_n, tile_m;
    int (*run)(const Int8Linear &, void *stream);
};

const SparseLinearKernel *sparse_linear_kernels(int *count);
const SparseLinearKernel *sparse_linear_find(const char *name);
// Null when 2:4 kernels can run the problem on a device of this capability, else the reason (static).
const char *sparse_linear_supports(int capability, int64_t m, int64_t n, int64_t k);
const SparseLinearKernel *sparse_linear_choose(int multiprocessors, int64_t m, int64_t n);

// a.weight: the units of gemm_pack_sparse(), a.ldw unused; a.k: twice the kept values of a row, or up to 7
// less.
int sparse_linear_run(const SparseLinearKernel &kernel, const Int8Linear &a, void *stream);

} // namespace tautorch::cuda
