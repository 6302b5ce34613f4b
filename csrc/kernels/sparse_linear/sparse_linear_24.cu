// The table of kernels, their choice, and the launch of 2:4's on common/gemm_sm80.cuh. Other main loops:
// CUTLASS's in sparse_linear_24_sm90a.cu, sparse_linear_bitmap.cu.
#include "kernels/sparse_linear/sparse_linear_cuda.h"

#include "kernels/common/gemm_sm80.cuh"
#include "kernels/int8_linear/int8_linear_store.cuh"

#include <algorithm>
#include <cstring>

namespace tautorch::cuda {

#define TAUTORCH_DECLARE(name, ...) int sparse_linear_##name(const Int8Linear &, void *);
TAUTORCH_SPARSE_LINEAR_24_SM90A(TAUTORCH_DECLARE)
TAUTORCH_SPARSE_LINEAR_BITMAP(TAUTORCH_DECLARE)
#undef TAUTORCH_DECLARE

namespace {

template <int kWarpsN, int kWarpsM, int kRowTiles, int kStages> int run(const Int8Linear &a, void *stream) {
    using Shape = GemmShape<SparseUnits, MatrixRows, kWarpsN, kWarpsM, kRowTiles, kStages>;
    const GemmLayout l = gemm_layout(a.n, a.k, kSparseUnit);
    return launch_gemm<Shape>(
        {reinterpret_cast<const uint8_t *>(a.weight), static_cast<int>(l.groups), static_cast<int>(l.steps)},
        {static_cast<const int8_t *>(a.x), a.ldx, a.m, a.k}, tile_store(a), stream);
}

template <bool kBf16, int kWarpsN, int kWarpsM, int kRowTiles, int kStages>
int run_float_of(const Int8Linear &a, void *stream) {
    using Shape = GemmShape<SparseFloatUnits<kBf16>, FloatRows, kWarpsN, kWarpsM, kRowTiles, kStages>;
    const GemmLayout l = gemm_layout(a.n, 2 * a.k, kSparseFloatUnit);
    TileStore store = tile_store(a);
    store.w_scale = nullptr;
    return launch_gemm<Shape>(
        {reinterpret_cast<const uint8_t *>(a.weight), static_cast<int>(l.groups), static_cast<int>(l.steps)},
        {{static_cast<const int8_t *>(a.x), 2 * a.ldx, a.m, 2 * a.k}}, store, stream);
}
template <int kWarpsN, int kWarpsM, int kRowTiles, int kStages>
int run_float(const Int8Linear &a, void *stream) {
    return a.x_dtype == DType::bf16 ? run_float_of<true, kWarpsN, kWarpsM, kRowTiles, kStages>(a, stream)
                                    : run_float_of<false, kWarpsN, kWarpsM, kRowTiles, kStages>(a, stream);
}

constexpr int kAnyLater = 9999;
#define TAUTORCH_SM90A(name, tm, tn, ...) {#name, 90, 90, tn, tm, SparseOrder::wgmma, &sparse_linear_##name},
#define TAUTORCH_ROW(name, warps_n, warps_m, tiles, stages)                                                  \
    {#name,                                                                                                  \
     80,                                                                                                     \
     kAnyLater,                                                                                              \
     64 * warps_n,                                                                                           \
     8 * tiles * warps_m,                                                                                    \
     SparseOrder::units,                                                                                     \
     &run<warps_n, warps_m, tiles, stages>},
#define TAUTORCH_FLOAT_ROW(name, warps_n, warps_m, tiles, stages)                                            \
    {#name,                                                                                                  \
     80,                                                                                                     \
     kAnyLater,                                                                                              \
     64 * warps_n,                                                                                           \
     8 * tiles * warps_m,                                                                                    \
     SparseOrder::float_units,                                                                               \
     &run_float<warps_n, warps_m, tiles, stages>},
#define TAUTORCH_BITMAP_ROW(name, row_tiles, ...)                                                            \
    {#name, 80, kAnyLater, kBitmapOutputs, 8 * row_tiles, SparseOrder::bitmap, &sparse_linear_##name},
constexpr SparseLinearKernel kTable[] = {TAUTORCH_SPARSE_LINEAR_24_SM90A(TAUTORCH_SM90A)
                                             TAUTORCH_SPARSE_LINEAR_24(TAUTORCH_ROW)
                                                 TAUTORCH_SPARSE_LINEAR_24_FLOAT(TAUTORCH_FLOAT_ROW)
                                                     TAUTORCH_SPARSE_LINEAR_BITMAP(TAUTORCH_BITMAP_ROW)};
#undef TAUTORCH_BITMAP_ROW
#undef TAUTORCH_FLOAT_ROW
#undef TAUTORCH_ROW
#undef TAUTORCH_SM90A
constexpr int kRows = static_cast<int>(sizeof kTable / sizeof kTable[0]);
constexpr int64_t kMax = (int64_t{1} << 31) - 256;

} // namespace

const SparseLinearKernel *sparse_linear_kernels(int *count) {
    *count = kRows;
    return kTable;
}

const SparseLinearKernel *sparse_linear_find(const char *name) {
    for (const SparseLinearKernel &k : kTable)
        if (std::strcmp(k.name, name) == 0)
            return &k;
    return nullptr;
}

const char *sparse_linear_supports(const SparseLinearKernel &kernel, int capability, int64_t m, int64_t n,
                                   int64_t k, DType x_dtype) {
    const bool floats = kernel.order == SparseOrder::float_units;
    if (floats && x_dtype != DType::bf16 && x_dtype != DType::f16)
        return "it multiplies bfloat16 and float16 by values of the same type";
    if (!floats && x_dtype != DType::i8)
        return "it multiplies int8 by int8 values";
    if (capability < 80)
        return kernel.order == SparseOrder::bitmap
                   ? "needs compute capability 8.0 or later"
                   : "2:4 needs the sparse tensor cores of compute capability 8.0 or later";
    if (capability < kernel.min_capability || capability > kernel.max_capability)
        return "needs compute capability 9.0 (H100, H200)";
    if (capability == 103 && !floats)
        return "compute capability 10.3 has almost no int8 throughput; keep the layer in bf16";
    if (m < 0 || m > kMax)
        return "M is outside 0..2^31 - 256";
    if (n < 1 || n > (int64_t{1} << 26))
        return "N is outside 1..2^26";
    if (kernel.order == SparseOrder::wgmma && n > (int64_t{1} << 24) - 64)
        return "N is above 2^24 - 64, where CUTLASS's strides between steps of places leave int32";
    if (floats && (k < 1 || k > int64_t{1} << 26))
        return "K is outside 1..2^26";
    if (!floats && (k < 1 || k > kMaxK))
        return "K is outside 1..66311, where int32 sums are exact";
    if (div_up(m, kernel.tile_m) * div_up(n, kernel.tile_n) > kMax)
        return "it has more than 2^31 tiles";
    return nullptr;
}

const SparseLinearKernel *sparse_linear_choose(int capability, int multiprocessors, int64_t m, int64_t n,
                                               int64_t k, DType x_dtype) {
    // Operands a multiply-add needs from L2, times the rounds of tiles over the multiprocessors; to be
    // replaced by measurements.
    const SparseLinearKernel *best = nullptr;
    double least = 0;
    for (const SparseLinearKernel &row : kTable) {
        if (row.order == SparseOrder::bitmap ||
            sparse_linear_supports(row, capability, m, n, k, x_dtype) != nullptr ||
            (best != nullptr && best->order == SparseOrder::wgmma))
            continue;
        const int64_t rounds = div_up(div_up(m, row.tile_m) * div_up(n, row.tile_n), multiprocessors);
        const double multiplying =
            row.tile_m * row.tile_n / (row.order == SparseOrder::wgmma ? 8192. : 4096.);
        const double size = x_dtype == DType::i8 ? 1 : 2; // bytes, and products at half the rate
        const double arriving = (row.tile_m * size + row.tile_n * (size / 2 + 0.125)) / 48.;
        const double cost = static_cast<double>(rounds) * std::max(size * multiplying, arriving);
        if (best == nullptr || cost <= least) { // of equals the larger, which comes later
            best = &row;
            least = cost;
        }
    }
    return best;
}

const SparseLinearKernel *sparse_linear_bitmap(int64_t m) {
    const SparseLinearKernel *last = nullptr;
    for (const SparseLinearKernel &row : kTable) {
        if (row.order != SparseOrder::bitmap)
            continue;
        last = &row;
        if (m <= row.tile_m)
            break;
    }
    return last;
}

int sparse_linear_run(const SparseLinearKernel &kernel, const Int8Linear &a, void *stream) {
    const bool floats = kernel.order == SparseOrder::float_units;
    const bool scales = floats ? a.out_dtype != DType::i32 && a.x_zero_point == nullptr
                               : a.out_dtype == DType::i32 || (a.x_scale != nullptr && a.w_scale != nullptr);
    if (sparse_linear_supports(kernel, kernel.min_capability, a.m, a.n, a.k, a.x_dtype) != nullptr ||
        !scales || (a.out_dtype == DType::i8 && a.out_scale == nullptr) || a.ldx < a.k ||
        a.ldx * size_of(a.x_dtype) % 16 != 0 || a.ldy < a.n || a.ldy * size_of(a.out_dtype) % 16 != 0 ||
        !is_aligned(a.x, 16) || !is_aligned(a.y, 16) || !is_aligned(a.weight, 16) ||
        (a.x_zero_point != nullptr && a.sums == nullptr))
        return kBadArgument;
    return a.m == 0 ? static_cast<int>(kOk) : kernel.run(a, stream);
}

} // namespace tautorch::cuda
