#include "kernels/common/gemm_pack_cuda.h"

#include "kernels/common/cuda_launch.cuh"

namespace tautorch::cuda {
namespace {

constexpr int kThreads = 128;

// Bytes at..at+3 of a row of `length`; `otherwise` past its end, or if there is no row.
__device__ __forceinline__ uint32_t word(const uint8_t *row, int64_t at, int64_t length, uint32_t otherwise) {
    uint32_t w = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        w |= (row != nullptr && at + i < length ? uint32_t{row[at + i]} : otherwise) << 8 * i;
    return w;
}

enum class Form { dense, sparse, sparse_float };
constexpr int unit_of(Form form) {
    return form == Form::dense ? kDenseUnit : form == Form::sparse ? kSparseUnit : kSparseFloatUnit;
}

// A warp per unit; a lane writes the pieces it will read. One warp of the block has one unit, in order of
// step. ld and length in bytes.
template <Form kForm>
__global__ void __launch_bounds__(kThreads)
    pack_units(const uint8_t *values, int64_t ld, const uint8_t *places, int64_t n, int64_t length,
               int64_t groups, int64_t steps, uint8_t *units) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t id = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
    if (id >= groups * steps)
        return;
    const int64_t n0 = id / steps * 64, step = id % steps;
    constexpr int kKept = kForm == Form::dense ? 64 : 32; // bytes of a row in a unit
    auto *to = reinterpret_cast<uint32_t *>(units + id * unit_of(kForm));
    for (int o = 0; o < 4; ++o) {
        for (int h = 0; h < kKept / 32; ++h) {
            for (int i = 0; i < 4; ++i) {
                const int64_t row = n0 + 16 * o + g + i % 2 * 8;
                to[(((o * (kKept / 32) + h) * 32) + lane) * 4 + i] =
                    word(row < n ? values + row * ld : nullptr, step * kKept + 32 * h + i / 2 * 16 + 4 * t,
                         length, 0);
            }
        }
    }
    to += 4 * 32 * 4;
    constexpr uint32_t kNone = 0x44; // 0, 1, 0, 1
    if constexpr (kForm == Form::sparse) {
        for (int o = 0; o < 4; ++o) {
            const int64_t row = n0 + 16 * o + g + t % 2 * 8;
            to[lane * 4 + o] = word(row < n ? places + row * (length / 4) : nullptr, step * 8 + t / 2 * 4,
                                    length / 4, kNone);
        }
    }
    if constexpr (kForm == Form::sparse_float) {
        for (int p = 0; p < 2; ++p) {
            const auto of = [&](int64_t row) {
                return word(row < n ? places + row * (length / 8) : nullptr, step * 4 + t % 2 * 2, length / 8,
                            kNone) &
                       0xffff;
            };
            const int64_t row = n0 + 16 * (2 * p + t / 2) + g;
            to[lane * 2 + p] = of(row) | of(row + 8) << 16;
        }
    }
}

// length: bytes of a row of values.
template <Form kForm>
int pack(const uint8_t *values, int64_t ld, const uint8_t *places, int64_t n, int64_t length, uint8_t *units,
         void *stream) {
    const GemmLayout l = gemm_layout(n, kForm == Form::dense ? length : 2 * length, unit_of(kForm));
    const int64_t blocks = div_up(l.groups * l.steps, kThreads / 32);
    if (n < 1 || length < 1 || ld < length || blocks >= int64_t{1} << 31 || !is_aligned(units, 16))
        return kBadArgument;
    return launch_kernel(&pack_units<kForm>, static_cast<unsigned>(blocks), kThreads, stream, values, ld,
                         places, n, length, l.groups, l.steps, units);
}

} // namespace

int gemm_pack_dense(const int8_t *weight, int64_t ld, int64_t n, int64_t k, uint8_t *units, void *stream) {
    return pack<Form::dense>(reinterpret_cast<const uint8_t *>(weight), ld, nullptr, n, k, units, stream);
}

int gemm_pack_sparse(const int8_t *values, const uint8_t *places, int64_t n, int64_t kept, uint8_t *units,
                     void *stream) {
    if (kept % 4 != 0)
        return kBadArgument;
    return pack<Form::sparse>(reinterpret_cast<const uint8_t *>(values), kept, places, n, kept, units,
                              stream);
}

int gemm_pack_sparse_float(const uint16_t *values, const uint8_t *places, int64_t n, int64_t kept,
                           uint8_t *units, void *stream) {
    if (kept % 4 != 0)
        return kBadArgument;
    return pack<Form::sparse_float>(reinterpret_cast<const uint8_t *>(values), 2 * kept, places, n, 2 * kept,
                                    units, stream);
}

} // namespace tautorch::cuda
