// The table of int8_linear's CUDA kernels and the choice among them. Host code.
#include <algorithm>
#include <cstring>
#include <string_view>

#include "kernels/common/tile_schedule.h"
#include "kernels/int8_linear/int8_linear_cuda.h"
#include "kernels/int8_linear/int8_linear_instances.h"

namespace tautorch::cuda {

#define TAUTORCH_DECLARE(name, ...) int int8_linear_##name(const Int8Linear &, void *);
TAUTORCH_INT8_LINEAR_SM90A(TAUTORCH_DECLARE)
TAUTORCH_INT8_LINEAR_STREAM(TAUTORCH_DECLARE)
TAUTORCH_INT8_LINEAR_WEIGHT_ONLY(TAUTORCH_DECLARE)
TAUTORCH_INT8_LINEAR_SM80(TAUTORCH_DECLARE)
#undef TAUTORCH_DECLARE
#define TAUTORCH_DECLARE(name, ...) int64_t int8_linear_workspace_##name(const Int8Linear &, int);
TAUTORCH_INT8_LINEAR_SM90A(TAUTORCH_DECLARE)
#undef TAUTORCH_DECLARE

namespace {

constexpr int kAnyLater = 9999;
using Kind = Int8LinearKind;

constexpr bool splits(const char *name) {
    const std::string_view n(name);
    return n.find("_split") != n.npos || n.find("_swapped") != n.npos;
}

#define TAUTORCH_SM90A(name, swapped, tm, tn, tk, cm, cn, ...)                                               \
    {#name,                                                                                                  \
     90,                                                                                                     \
     90,                                                                                                     \
     tm,                                                                                                     \
     tn,                                                                                                     \
     tk,                                                                                                     \
     swapped ? cn : cm,                                                                                      \
     swapped ? cm : cn,                                                                                      \
     Kind::tile,                                                                                             \
     splits(#name),                                                                                          \
     int8_linear_##name,                                                                                     \
     splits(#name) ? int8_linear_workspace_##name : nullptr},
#define TAUTORCH_STREAM(name, rows, outs, ...)                                                               \
    {#name, 80, kAnyLater, 8 * rows, 16 * outs, 64, 1, 1, Kind::stream, false, int8_linear_##name, nullptr},
#define TAUTORCH_WEIGHT_ONLY(name, rows, outs, ...)                                                          \
    {#name, 80, kAnyLater,         8 * rows, 16 * outs,          64,                                         \
     1,     1,  Kind::weight_only, false,    int8_linear_##name, nullptr},
#define TAUTORCH_SM80(name, tm, tn, tk, ...)                                                                 \
    {#name, 80, kAnyLater, tm, tn, tk, 1, 1, Kind::tile, false, int8_linear_##name, nullptr},
constexpr Int8LinearKernel kTable[] = {
    TAUTORCH_INT8_LINEAR_SM90A(TAUTORCH_SM90A) TAUTORCH_INT8_LINEAR_STREAM(TAUTORCH_STREAM)
        TAUTORCH_INT8_LINEAR_WEIGHT_ONLY(TAUTORCH_WEIGHT_ONLY) TAUTORCH_INT8_LINEAR_SM80(TAUTORCH_SM80)};
#undef TAUTORCH_SM90A
#undef TAUTORCH_STREAM
#undef TAUTORCH_WEIGHT_ONLY
#undef TAUTORCH_SM80
constexpr int kRows = static_cast<int>(sizeof kTable / sizeof kTable[0]);

// Grid y of the sm80 tiles, in tiles of at least 64 columns, is at most 65535.
constexpr int64_t kMaxN = int64_t{65535} * 64;
constexpr int64_t kMaxM = (int64_t{1} << 31) - 256;
// So many rows read the weights once in the largest of the kernels that stream them.
constexpr int64_t kFewRows = 32;

// Estimated cycles; every constant is of a datasheet or a guess, and gives way to measurements (tuning.py).
// A tile takes, per element of K, its multiplications (wgmma 4096 multiply-adds a cycle, mma.sync 2048) or
// the arrival of its operands from L2 at 48 bytes a cycle. Nothing is faster than weights and rows arrive
// from memory, 20 bytes a cycle and multiprocessor. What splits K balances the load, and pays a clearing of
// counters and an exchange of sums, about 2 microseconds.
double cost(const Int8LinearKernel &kernel, int multiprocessors, int64_t m, int64_t n, int64_t k) {
    const int64_t tiles =
        TileGrid{div_up(m, kernel.tile_m), div_up(n, kernel.tile_n), kernel.cluster_m, kernel.cluster_n}
            .tiles();
    const double multiplying = kernel.tile_m * kernel.tile_n / (kernel.min_capability == 90 ? 4096. : 2048.);
    const double arriving = (kernel.tile_m + kernel.tile_n) / 48.;
    const double tile = std::max(multiplying, arriving) * static_cast<double>(k);
    const auto [rounds, split] = kernel.splits_k
                                     ? shared_rounds(tiles, div_up(k, kernel.tile_k), multiprocessors)
                                     : whole_rounds(tiles, multiprocessors);
    const double memory = static_cast<double>(m + n) * static_cast<double>(k) / (20. * multiprocessors);
    // Of those that memory holds back, the one with the least to do.
    return std::max(rounds * tile, memory) + rounds * tile / 16 + (split ? 3500 : 0);
}

} // namespace

const Int8LinearKernel *int8_linear_kernels(int *count) {
    *count = kRows;
    return kTable;
}

const Int8LinearKernel *int8_linear_find(const char *name) {
    for (const Int8LinearKernel &k : kTable)
        if (std::strcmp(k.name, name) == 0)
            return &k;
    return nullptr;
}

const char *int8_linear_supports(const Int8LinearKernel &kernel, int capability, int64_t m, int64_t n,
                                 int64_t k, bool weight_only, DType x_dtype) {
    if (capability < kernel.min_capability || capability > kernel.max_capability) {
        return kernel.max_capability == 90 ? "needs compute capability 9.0 (H100, H200)"
                                           : "needs compute capability 8.0 or later";
    }
    if (weight_only) {
        if (kernel.kind != Kind::weight_only)
            return "it quantises its input, which a weight-only layer must not";
        if (x_dtype != DType::bf16 && x_dtype != DType::f16)
            return "weight-only products take bfloat16 and float16 here";
    } else if (kernel.kind == Kind::weight_only) {
        return "it is for weight-only layers: it does not quantise its input";
    } else if (capability == 103) {
        return "compute capability 10.3 has almost no int8 throughput; keep the layer in bf16";
    }
    if (m < 0 || m > kMaxM)
        return "M is outside 0..2^31 - 256";
    if (n < 1 || n > kMaxN)
        return "N is outside 1..4194240";
    if (k < 1 || k > kMaxK)
        return "K is outside 1..66311, where int32 sums are exact";
    if (kernel.kind != Kind::tile && div_up(m, kernel.tile_m) * div_up(n, kernel.tile_n) >= int64_t{1} << 31)
        return "it has more than 2^31 - 1 tiles; it is for few rows";
    return nullptr;
}

const Int8LinearKernel *int8_linear_choose(int capability, int multiprocessors, int64_t m, int64_t n,
                                           int64_t k, bool weight_only, DType x_dtype) {
    const Int8LinearKernel *best = nullptr;
    for (const Int8LinearKernel &row : kTable) {
        if (int8_linear_supports(row, capability, m, n, k, weight_only, x_dtype) != nullptr)
            continue;
        if (row.kind != Kind::tile && m <= kFewRows) {
            // The smallest that reads the weights once.
            if (m <= row.tile_m)
                return &row;
            continue;
        }
        if (row.kind == Kind::weight_only)
            continue; // by Triton
        // The table begins with the most specific architecture: where that has tiles, others' are slower.
        if (best != nullptr && row.kind == Kind::tile && row.min_capability < best->min_capability)
            break;
        if (best == nullptr || cost(row, multiprocessors, m, n, k) < cost(*best, multiprocessors, m, n, k))
            best = &row;
    }
    return best;
}

int64_t int8_linear_kernel_workspace(const Int8LinearKernel &kernel, const Int8Linear &a,
                                     int multiprocessors) {
    return kernel.workspace == nullptr || a.m == 0 ? 0 : kernel.workspace(a, multiprocessors);
}

int int8_linear_run(const Int8LinearKernel &kernel, const Int8Linear &a, void *stream) {
    const int64_t bytes = size_of(a.out_dtype), x_bytes = size_of(a.x_dtype);
    const bool weight_only = a.x_dtype != DType::i8;
    if (int8_linear_supports(kernel, kernel.min_capability, a.m, a.n, a.k, weight_only, a.x_dtype) !=
            nullptr ||
        (weight_only && (a.out_dtype == DType::i32 || a.x_zero_point != nullptr)))
        return kBadArgument;
    if (a.m == 0)
        return kOk;
    const bool scales =
        a.out_dtype == DType::i32 || ((weight_only || a.x_scale != nullptr) && a.w_scale != nullptr);
    const bool requantised = a.out_dtype != DType::i8 || a.out_scale != nullptr;
    if (!scales || !requantised || a.ldx < a.k || a.ldx * x_bytes % 16 != 0 || a.ldy < a.n ||
        a.ldy * bytes % 16 != 0 || !is_aligned(a.x, 16) || !is_aligned(a.y, 16) ||
        !is_aligned(a.weight, 16) || a.ldw < a.k || a.ldw % 16 != 0 ||
        (a.x_zero_point != nullptr && a.sums == nullptr))
        return kBadArgument;
    return kernel.run(a, stream);
}

} // namespace tautorch::cuda
