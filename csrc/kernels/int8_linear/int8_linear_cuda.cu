// The table of int8_linear's CUDA kernels and the choice among them. Host code.
#include <cstring>

#include "kernels/int8_linear/int8_linear_cuda.h"
#include "kernels/int8_linear/int8_linear_instances.h"

namespace tautorch::cuda {

#define TAUTORCH_DECLARE(name, ...) int int8_linear_##name(const Int8Linear &, void *);
TAUTORCH_INT8_LINEAR_SM90A(TAUTORCH_DECLARE)
TAUTORCH_INT8_LINEAR_SM80(TAUTORCH_DECLARE)
#undef TAUTORCH_DECLARE

namespace {

constexpr int kAnyLater = 9999;

#define TAUTORCH_ROW_SM90A(name, tm, tn, tk, ...) {#name, 90, 90, tm, tn, tk, int8_linear_##name},
#define TAUTORCH_ROW_SM80(name, tm, tn, tk, ...) {#name, 80, kAnyLater, tm, tn, tk, int8_linear_##name},
constexpr Int8LinearKernel kTable[] = {TAUTORCH_INT8_LINEAR_SM90A(TAUTORCH_ROW_SM90A)
                                           TAUTORCH_INT8_LINEAR_SM80(TAUTORCH_ROW_SM80)};
#undef TAUTORCH_ROW_SM90A
#undef TAUTORCH_ROW_SM80
constexpr int kRows = static_cast<int>(sizeof kTable / sizeof kTable[0]);

// Grid y of the sm80 kernels, in tiles of at least 64 columns, is at most 65535.
constexpr int64_t kMaxN = int64_t{65535} * 64;
constexpr int64_t kMaxM = (int64_t{1} << 31) - 256;

// What a tile costs, in units of one output at the rate of the largest tile: a small tile reads more shared
// memory per multiply-add. The percentages are estimates from the operand traffic, to be replaced by
// measurements.
int64_t tile_cost(const Int8LinearKernel &k) {
    const int64_t outputs = int64_t{k.tile_m} * k.tile_n;
    const int64_t percent = outputs >= 128 * 256 ? 100 : (outputs >= 128 * 128 ? 95 : 50);
    return outputs * 100 / percent;
}

int64_t cost(const Int8LinearKernel &k, int multiprocessors, int64_t m, int64_t n) {
    const int64_t tiles = ((m + k.tile_m - 1) / k.tile_m) * ((n + k.tile_n - 1) / k.tile_n);
    const int64_t waves = (tiles + multiprocessors - 1) / multiprocessors;
    return waves * tile_cost(k);
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
                                 int64_t k) {
    if (capability < kernel.min_capability || capability > kernel.max_capability) {
        return kernel.max_capability == 90 ? "needs compute capability 9.0 (H100, H200)"
                                           : "needs compute capability 8.0 or later";
    }
    if (capability == 103)
        return "compute capability 10.3 has almost no int8 throughput; keep the layer in bf16";
    if (m < 0 || m > kMaxM)
        return "M is outside 0..2^31 - 256";
    if (n < 1 || n > kMaxN)
        return "N is outside 1..4194240";
    if (k < 1 || k > kMaxK)
        return "K is outside 1..66311, where int32 sums are exact";
    return nullptr;
}

const Int8LinearKernel *int8_linear_choose(int capability, int multiprocessors, int64_t m, int64_t n,
                                           int64_t k) {
    const Int8LinearKernel *best = nullptr;
    for (const Int8LinearKernel &row : kTable) {
        if (int8_linear_supports(row, capability, m, n, k) != nullptr)
            continue;
        // The table begins with the most specific architecture: the first that can run settles it.
        if (best != nullptr && row.min_capability < best->min_capability)
            break;
        if (best == nullptr || cost(row, multiprocessors, m, n) < cost(*best, multiprocessors, m, n))
            best = &row;
    }
    return best;
}

int int8_linear_run(const Int8LinearKernel &kernel, const Int8Linear &a, void *stream) {
    const int64_t bytes = size_of(a.out_dtype);
    if (int8_linear_supports(kernel, kernel.min_capability, a.m, a.n, a.k) != nullptr)
        return kBadArgument;
    if (a.m == 0)
        return kOk;
    const bool scales = a.out_dtype == DType::i32 || (a.x_scale != nullptr && a.w_scale != nullptr);
    const bool requantised = a.out_dtype != DType::i8 || a.out_scale != nullptr;
    if (!scales || !requantised || a.ldx < a.k || a.ldx % 16 != 0 || a.ldy < a.n || a.ldy * bytes % 16 != 0 ||
        !is_aligned(a.x, 16) || !is_aligned(a.y, 16) || !is_aligned(a.weight, 16) || a.ldw < a.k ||
        a.ldw % 16 != 0 || (a.x_zero_point != nullptr && a.sums == nullptr))
        return kBadArgument;
    return kernel.run(a, stream);
}

} // namespace tautorch::cuda
