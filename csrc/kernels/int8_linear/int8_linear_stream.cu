// int8_linear for few rows, compute capability 8.0 and later: weights go through shared memory once, at the
// rate of memory. By the same code bf16 and fp16 rows that must not be quantised (weight-only).
//
// A block makes all sums of kOutTiles * 16 outputs; its warps take turns along K, 64 elements at a time, and
// their partial sums are added in a fixed order at the end: nothing passes between blocks, and no workspace
// is needed. Weights are the A operand (16 outputs), rows of x the B operand (8 rows), so that one row costs
// no more than 8. Every thread copies the very bytes its own multiplications read, 16 at a time, into slots
// of its own: the loop over K has no barrier, only each thread's wait for its oldest group of copies.
#include "kernels/common/cuda_launch.cuh"
#include "kernels/common/mma_sm80.cuh"
#include "kernels/common/tile_store.cuh"
#include "kernels/int8_linear/int8_linear_instances.h"
#include "kernels/int8_linear/int8_linear_store.cuh"

namespace tautorch::cuda {
namespace {

struct alignas(16) Piece {
    uint32_t w[4];
};

struct Int8Row {
    using Sum = int32_t;
    static constexpr int kBytes = 1;
    // 16 elements of K per thread, in two steps of 32 over the 4 threads of a group.
    template <int kRowTiles, int kOutTiles>
    static __device__ __forceinline__ void multiply(Sum (&sum)[kOutTiles][kRowTiles][4],
                                                    const Piece (&w)[2 * kOutTiles],
                                                    const Piece (&x)[kRowTiles]) {
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
#pragma unroll
            for (int o = 0; o < kOutTiles; ++o) {
                const uint32_t a[4] = {w[2 * o].w[half], w[2 * o + 1].w[half], w[2 * o].w[half + 1],
                                       w[2 * o + 1].w[half + 1]};
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r)
                    mma_m16n8k32(sum[o][r], a, x[r].w[half], x[r].w[half + 1]);
            }
        }
    }
};

// Pairs of int8 as 16-bit floats, exactly: bytes 0, 1 or 2, 3 of w.
struct Bf16 {
    // A byte is its low 7 bits less 128 if the high one is set. 0x4300 | b is 128 + b for 7 bits, and
    // 0x4300 | 0x80 is 256.
    static __device__ __forceinline__ uint32_t pair(uint32_t w, uint32_t which) {
        const uint32_t v = byte_perm(w, 0, which);
        return sub_bf16x2((v & 0x007f007fu) | 0x43004300u, (v & 0x00800080u) | 0x43004300u);
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
        mma_m16n8k16_bf16(d, a, b0, b1);
    }
};
struct F16 {
    // 0x6400 | u is 1024 + u, with u the byte plus 128.
    static __device__ __forceinline__ uint32_t pair(uint32_t w, uint32_t which) {
        return sub_f16x2(byte_perm(w ^ 0x80808080u, 0, which) | 0x64006400u, 0x64806480u); // 1152
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
        mma_m16n8k16_f16(d, a, b0, b1);
    }
};

template <class Type> struct FloatRow {
    using Sum = float;
    static constexpr int kBytes = 2;
    // 16 elements of K per thread, in four steps of 16 over the 4 threads of a group.
    template <int kRowTiles, int kOutTiles>
    static __device__ __forceinline__ void multiply(Sum (&sum)[kOutTiles][kRowTiles][4],
                                                    const Piece (&w)[2 * kOutTiles],
                                                    const Piece (&x)[2 * kRowTiles]) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
#pragma unroll
            for (int o = 0; o < kOutTiles; ++o) {
                const uint32_t top = w[2 * o].w[q], bottom = w[2 * o + 1].w[q];
                const uint32_t a[4] = {Type::pair(top, 0x4140), Type::pair(bottom, 0x4140),
                                       Type::pair(top, 0x4342), Type::pair(bottom, 0x4342)};
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    const Piece &b = x[2 * r + q / 2];
                    Type::mma(sum[o][r], a, b.w[q % 2 * 2], b.w[q % 2 * 2 + 1]);
                }
            }
        }
    }
};

template <class X, int kRowTiles_, int kOutTiles_, int kWarps_, int kStages_> struct Stream {
    using Row = X;
    static constexpr int kRowTiles = kRowTiles_, kOutTiles = kOutTiles_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kRows = 8 * kRowTiles, kOutputs = 16 * kOutTiles, kStep = 64;
    static constexpr int kWeightPieces = 2 * kOutTiles, kRowPieces = X::kBytes * kRowTiles;
    static constexpr int kPieces = kWeightPieces + kRowPieces;
    static constexpr int kRing = kStages * kWarps * kPieces * 32 * static_cast<int>(sizeof(Piece));
    // Sums at the end, in the ring's place. The pitch spreads a fragment's 32 stores over the banks.
    static constexpr int kPitch = kOutputs + 4;
    static_assert(kWarps * kRows * kPitch * 4 <= kRing, "the sums do not fit into the ring");
    static_assert(kRing <= 99 * 1024, "compute capability 8.6 and 8.9 have no more");
};

template <class S> __global__ void __launch_bounds__(S::kWarps * 32) stream_kernel(const Int8Linear a) {
    using Sum = typename S::Row::Sum;
    constexpr int kBytes = S::Row::kBytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    const auto tiles = static_cast<unsigned>((a.n + S::kOutputs - 1) / S::kOutputs);
    const int64_t n0 = int64_t{blockIdx.x % tiles} * S::kOutputs, m0 = int64_t{blockIdx.x / tiles} * S::kRows;
    // [stage][piece][thread of the block]
    Piece *ring = reinterpret_cast<Piece *>(dynamic_shared()) + threadIdx.x;
    constexpr int kNext = S::kWarps * 32;

    // 16 elements of K from 16 t on, of rows g, g + 8, ... Rows outside are not read.
    const int8_t *weights = a.weight + (n0 + g) * a.ldw + 16 * t;
    const char *rows = static_cast<const char *>(a.x) + ((m0 + g) * a.ldx + 16 * t) * kBytes;
    const auto load = [&](int stage, int64_t k0) {
        Piece *to = ring + stage * S::kPieces * kNext;
        const int64_t left = a.k - k0 - 16 * t; // elements of K from this thread's first on
#pragma unroll
        for (int i = 0; i < S::kWeightPieces; ++i) {
            const bool inside = left > 0 && n0 + g + 8 * i < a.n;
            cp_async_once(to + i * kNext, inside ? weights + 8 * i * a.ldw + k0 : a.weight, inside ? 16 : 0);
        }
#pragma unroll
        for (int i = 0; i < S::kRowPieces; ++i) {
            // Float rows end with K: what follows may be NaN, which the weights' zeros would not silence.
            const int64_t bytes = kBytes == 1 ? (left > 0 ? 16 : 0) : left * 2 - i % 2 * 16;
            const bool inside = bytes > 0 && m0 + g + 8 * (i / kBytes) < a.m;
            const char *from = rows + (8 * (i / kBytes) * a.ldx + k0) * kBytes + i % kBytes * 16;
            cp_async(to + (S::kWeightPieces + i) * kNext, inside ? from : static_cast<const char *>(a.x),
                     inside ? static_cast<int>(bytes < 16 ? bytes : 16) : 0);
        }
    };

    Sum sum[S::kOutTiles][S::kRowTiles][4] = {};
    constexpr int64_t kTurn = S::kWarps * S::kStep;
    int64_t next = int64_t{warp} * S::kStep; // K of the next group of copies
#pragma unroll
    for (int s = 0; s < S::kStages - 1; ++s, next += kTurn) {
        if (next < a.k)
            load(s, next);
        cp_async_commit();
    }
    int stage = 0;
    for (int64_t k0 = int64_t{warp} * S::kStep; k0 < a.k; k0 += kTurn, next += kTurn) {
        cp_async_wait<S::kStages - 2>();
        const Piece *from = ring + stage * S::kPieces * kNext;
        Piece w[S::kWeightPieces], x[S::kRowPieces];
#pragma unroll
        for (int i = 0; i < S::kWeightPieces; ++i)
            w[i] = from[i * kNext];
#pragma unroll
        for (int i = 0; i < S::kRowPieces; ++i)
            x[i] = from[(S::kWeightPieces + i) * kNext];
        // Into the stage that was read one step ago, by this thread alone.
        if (next < a.k)
            load(stage == 0 ? S::kStages - 1 : stage - 1, next);
        cp_async_commit();
        S::Row::template multiply<S::kRowTiles, S::kOutTiles>(sum, w, x);
        stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }

    // No copy may land on the sums: those left are empty groups, but other threads' slots are overwritten.
    cp_async_wait<0>();
    __syncthreads();
    Sum *parts = reinterpret_cast<Sum *>(dynamic_shared());
    Sum *mine = parts + warp * S::kRows * S::kPitch;
#pragma unroll
    for (int o = 0; o < S::kOutTiles; ++o) {
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                mine[(8 * r + 2 * t + i % 2) * S::kPitch + 16 * o + g + i / 2 * 8] = sum[o][r][i];
        }
    }
    __syncthreads();
    store_tile<Sum, S::kRows, S::kOutputs, S::kPitch, S::kWarps, S::kWarps * 32>(
        tile_store(a), parts, [&](int r) { return m0 + r; }, n0);
}

template <class S> int launch(const Int8Linear &a, void *stream) {
    const int64_t blocks = div_up(a.n, S::kOutputs) * div_up(a.m, S::kRows);
    if (blocks >= int64_t{1} << 31)
        return kBadArgument;
    return launch_shared<&stream_kernel<S>>(static_cast<unsigned>(blocks), S::kWarps * 32, S::kRing, stream,
                                            a);
}

} // namespace

#define TAUTORCH_DEFINE(name, row_tiles, out_tiles, warps, stages)                                           \
    int int8_linear_##name(const Int8Linear &a, void *stream) {                                              \
        return launch<Stream<Int8Row, row_tiles, out_tiles, warps, stages>>(a, stream);                      \
    }
TAUTORCH_INT8_LINEAR_STREAM(TAUTORCH_DEFINE)
#undef TAUTORCH_DEFINE

#define TAUTORCH_DEFINE(name, row_tiles, out_tiles, warps, stages)                                           \
    int int8_linear_##name(const Int8Linear &a, void *stream) {                                              \
        if (a.x_dtype == DType::bf16)                                                                        \
            return launch<Stream<FloatRow<Bf16>, row_tiles, out_tiles, warps, stages>>(a, stream);           \
        return launch<Stream<FloatRow<F16>, row_tiles, out_tiles, warps, stages>>(a, stream);                \
    }
TAUTORCH_INT8_LINEAR_WEIGHT_ONLY(TAUTORCH_DEFINE)
#undef TAUTORCH_DEFINE

} // namespace tautorch::cuda
