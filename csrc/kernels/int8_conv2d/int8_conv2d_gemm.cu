// The table of convolution kernels and their choice. The main loop is in common/gemm_sm80.cuh.
#include "kernels/int8_conv2d/int8_conv2d_gemm.cuh"

#include <algorithm>
#include <cstring>

namespace tautorch::cuda {
namespace {

#define TAUTORCH_ROW(name, warps_n, warps_m, tiles, stages)                                                  \
    {#name, 64 * warps_n, 8 * tiles * warps_m, &run_conv2d<DenseUnits, warps_n, warps_m, tiles, stages>},
constexpr Int8Conv2dKernel kTable[] = {TAUTORCH_INT8_CONV2D(TAUTORCH_ROW)};
#undef TAUTORCH_ROW
constexpr int kRows = static_cast<int>(sizeof kTable / sizeof kTable[0]);

constexpr int64_t kMaxSide = int64_t{1} << 24, kMaxRows = (int64_t{1} << 31) - 256;

} // namespace

const Int8Conv2dKernel *int8_conv2d_kernels(int *count) {
    *count = kRows;
    return kTable;
}

const Int8Conv2dKernel *int8_conv2d_find(const char *name) {
    for (const Int8Conv2dKernel &k : kTable)
        if (std::strcmp(k.name, name) == 0)
            return &k;
    return nullptr;
}

const char *int8_conv2d_supports(int capability, int64_t groups, int64_t channels, int64_t outputs,
                                 int64_t taps) {
    if (capability < 80)
        return "needs compute capability 8.0 or later";
    if (capability == 103)
        return "compute capability 10.3 has almost no int8 throughput; keep the layer in bf16";
    if (groups != 1)
        return "it has no groups";
    if (channels < 16 || channels % 16 != 0)
        return "it reads input channels 16 at a time; their number must be a multiple of 16";
    if (channels * taps > kMaxK)
        return "K is above 66311, where int32 sums are exact";
    if (outputs < 1 || outputs > int64_t{1} << 26)
        return "output channels are outside 1..2^26";
    return nullptr;
}

const Int8Conv2dKernel *conv2d_fastest(const Int8Conv2dKernel *table, int count, double rate, double share,
                                       int multiprocessors, int64_t m, int64_t outputs) {
    const Int8Conv2dKernel *best = nullptr;
    double least = 0;
    for (int i = 0; i < count; ++i) {
        const Int8Conv2dKernel &k = table[i];
        const int64_t rounds = div_up(div_up(m, k.tile_m) * div_up(outputs, k.tile_n), multiprocessors);
        const double multiplying = k.tile_m * k.tile_n / rate;
        const double arriving = (k.tile_m + k.tile_n * share) / 48.;
        const double cost = static_cast<double>(rounds) * std::max(multiplying, arriving);
        if (best == nullptr || cost <= least) { // of equals the larger, which comes later
            best = &k;
            least = cost;
        }
    }
    return best;
}

const Int8Conv2dKernel *int8_conv2d_choose(int multiprocessors, int64_t m, int64_t outputs) {
    return conv2d_fastest(kTable, kRows, 2048, 1, multiprocessors, m, outputs);
}

int int8_conv2d_run(const Int8Conv2dKernel &kernel, const Int8Conv2d &a, void *stream) {
    if (int8_conv2d_supports(80, 1, a.channels, a.outputs, a.taps_h * a.taps_w) != nullptr || a.batch < 0 ||
        a.height < 1 || a.width < 1 || a.taps_h < 1 || a.taps_w < 1 || a.stride_h < 1 || a.stride_w < 1 ||
        a.dilation_h < 1 || a.dilation_w < 1 || a.padding_h < 0 || a.padding_w < 0)
        return kBadArgument;
    for (const int64_t side : {a.height, a.width, a.taps_h, a.taps_w, a.stride_h, a.stride_w, a.padding_h,
                               a.padding_w, a.dilation_h, a.dilation_w})
        if (side > kMaxSide)
            return kBadArgument;
    if (a.dilation_h * (a.taps_h - 1) >= a.height + 2 * a.padding_h ||
        a.dilation_w * (a.taps_w - 1) >= a.width + 2 * a.padding_w)
        return kBadArgument;
    if (a.batch == 0)
        return kOk;
    const int64_t pixels = a.out_height() * a.out_width();
    const bool scales = a.out_dtype == DType::i32 || (a.x_scale != nullptr && a.w_scale != nullptr);
    const bool zero_point =
        a.x_zero_point == nullptr || (a.sums != nullptr && a.outside != nullptr && is_aligned(a.outside, 16));
    if (pixels > kMaxRows / a.batch || !scales || !zero_point ||
        (a.out_dtype == DType::i8 && a.out_scale == nullptr) || a.ldy < a.outputs ||
        a.ldy * size_of(a.out_dtype) % 16 != 0 || !is_aligned(a.x, 16) || !is_aligned(a.y, 16) ||
        !is_aligned(a.units, 16))
        return kBadArgument;
    return kernel.run(a, stream);
}

} // namespace tautorch::cuda
