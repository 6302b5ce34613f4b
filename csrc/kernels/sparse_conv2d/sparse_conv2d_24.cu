// The table of 2:4 convolution kernels. Launch and checks are int8_conv2d's; the main loop is in
// common/gemm_sm80.cuh.
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

#include "kernels/int8_conv2d/int8_conv2d_gemm.cuh"

#include <cstring>

namespace tautorch::cuda {
namespace {

#define TAUTORCH_ROW(name, warps_n, warps_m, tiles, stages)                                                  \
    {#name, 64 * warps_n, 8 * tiles * warps_m, &run_conv2d<SparseUnits, warps_n, warps_m, tiles, stages>},
constexpr Int8Conv2dKernel kTable[] = {TAUTORCH_SPARSE_CONV2D_24(TAUTORCH_ROW)};
#undef TAUTORCH_ROW
constexpr int kRows = static_cast<int>(sizeof kTable / sizeof kTable[0]);

} // namespace

const Int8Conv2dKernel *sparse_conv2d_kernels(int *count) {
    *count = kRows;
    return kTable;
}

const Int8Conv2dKernel *sparse_conv2d_find(const char *name) {
    for (const Int8Conv2dKernel &k : kTable)
        if (std::strcmp(k.name, name) == 0)
            return &k;
    return nullptr;
}

const char *sparse_conv2d_supports(int capability, int64_t groups, int64_t channels, int64_t outputs,
                                   int64_t taps) {
    if (taps != 1)
        return "2:4 groups of a window of several pixels run along its taps, which no instruction takes from "
               "a "
               "channels-last image; it is for 1x1";
    return int8_conv2d_supports(capability, groups, channels, outputs, taps);
}

const Int8Conv2dKernel *sparse_conv2d_choose(int multiprocessors, int64_t m, int64_t outputs) {
    return conv2d_fastest(kTable, kRows, 4096, 0.625, multiprocessors, m, outputs);
}

} // namespace tautorch::cuda
