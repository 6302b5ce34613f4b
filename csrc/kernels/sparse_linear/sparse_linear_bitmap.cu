// sparse_linear of unstructured int8 weights, compute capability 8.0 and later: bits and kept values go
// through shared memory once, at the rate of memory, and become mma's operand in registers.
//
// The shape of int8_linear_stream.cu: a block makes all sums of 16 outputs, its warps take turns along K, 64
// elements at a time, and their sums are added in a fixed order at the end. Here a warp's copies are read by
// its other lanes, hence the barrier of a warp a step. More rows than a tile has take the weights again.
#include "kernels/sparse_linear/sparse_linear_bitmap_cuda.h"

#include "kernels/common/cuda_launch.cuh"
#include "kernels/common/mma_sm80.cuh"
#include "kernels/common/tile_store.cuh"
#include "kernels/int8_linear/int8_linear_store.cuh"

namespace tautorch::cuda {
namespace {

struct alignas(16) Piece {
    uint32_t w[4];
};

// A warp's part of a stage, as it is in shared memory.
template <int kRowTiles> struct Slot {
    uint32_t maps[32];
    alignas(16) uint8_t values[kBitmapValues]; // up to 12 bytes past a unit's end are read and not used
    Piece x[kRowTiles][32];
};

template <int kRowTiles_, int kWarps_, int kStages_> struct Bitmap {
    static constexpr int kRowTiles = kRowTiles_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kRows = 8 * kRowTiles;
    // Bytes for kMaxK's steps, and where the last one ends.
    static constexpr int kOffsets =
        static_cast<int>((kMaxK + kBitmapStep - 1) / kBitmapStep + 1 + 3) / 4 * 16;
    static constexpr int kRing = kStages * kWarps * static_cast<int>(sizeof(Slot<kRowTiles>));
    static constexpr int kShared = kRing + kOffsets;
    static constexpr int kPitch = kBitmapOutputs + 4;
    static_assert(kWarps * kRows * kPitch * 4 <= kRing, "the sums do not fit into the ring");
    static_assert(kShared <= 99 * 1024, "compute capability 8.6 and 8.9 have no more");
};

// Of a lane: how many values the lanes before it have.
__device__ __forceinline__ uint32_t values_before(uint32_t map) {
    const auto mine = static_cast<uint32_t>(__popc(map));
    uint32_t all = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, all, d);
        if (threadIdx.x % 32 >= d)
            all += before;
    }
    return all - mine;
}

// 16 elements of an output: bytes of `values`, on 4, from bit `at` on where `map` has a bit, in order, else
// 0. `at` is moved past them.
__device__ __forceinline__ Piece expand(const uint8_t *values, uint32_t &at, uint32_t map) {
    Piece w;
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        // Eight bytes from any address; no half has more values. The shift counts modulo 32.
        const auto *from = reinterpret_cast<const uint32_t *>(values) + at / 32;
        const uint32_t middle = from[1];
        const uint32_t low = __funnelshift_r(from[0], middle, at),
                       high = __funnelshift_r(middle, from[2], at);
        // Digit i of s is element i's bit. Digit i of s * 0x1110 counts the bits below it, which is the
        // number of its byte; 4 more where it has none itself: a byte of 0. Digit 3 of s * 0x1111 counts all
        // four.
        const uint32_t s0 = map >> half & 0x1111u, s1 = map >> (half + 1) & 0x1111u;
        const uint32_t bits0 = s0 * 0x1111u >> 9 & 0x38u, bits1 = s1 * 0x1111u >> 9 & 0x38u;
        w.w[half] = byte_perm(low, 0, s0 * 0x110cu + 0x4444u);
        w.w[half + 1] = byte_perm(__funnelshift_rc(low, high, bits0), 0, s1 * 0x110cu + 0x4444u);
        at += bits0 + bits1;
    }
    return w;
}

template <class S>
__global__ void __launch_bounds__(S::kWarps * 32) bitmap_kernel(const Int8Linear a, const BitmapLayout l) {
    using WarpSlot = Slot<S::kRowTiles>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    const auto tiles = static_cast<unsigned>(l.tiles);
    const int steps = static_cast<int>(l.steps);
    const int64_t tile = blockIdx.x % tiles, m0 = int64_t{blockIdx.x / tiles} * S::kRows;
    const auto *pack = reinterpret_cast<const uint8_t *>(a.weight);
    const uint8_t *maps = pack + tile * l.steps * kBitmapMaps;
    const uint8_t *values = pack + l.values_off;
    const auto *unit = reinterpret_cast<const uint32_t *>(pack + l.offsets_off) + tile * l.steps;
    auto *offsets = reinterpret_cast<uint32_t *>(dynamic_shared() + S::kRing);
    WarpSlot *ring = reinterpret_cast<WarpSlot *>(dynamic_shared()) + warp; // [stage][warp]

    for (int i = threadIdx.x; i <= steps; i += S::kWarps * 32)
        offsets[i] = unit[i];
    __syncthreads();

    const auto *rows = static_cast<const int8_t *>(a.x) + (m0 + g) * a.ldx + 16 * t;
    const auto load = [&](int stage, int step) {
        WarpSlot &to = ring[stage * S::kWarps];
        if (lane < 8)
            cp_async_once(to.maps + 4 * lane, maps + step * kBitmapMaps + 16 * lane, 16);
        const uint32_t begin = offsets[step];
        const int pieces = static_cast<int>(offsets[step + 1] - begin);
        const uint8_t *from = values + int64_t{begin} * 16;
        if (lane < pieces)
            cp_async_once(to.values + 16 * lane, from + 16 * lane, 16);
        if (lane + 32 < pieces)
            cp_async_once(to.values + 16 * lane + 512, from + 16 * lane + 512, 16);
        const int64_t k0 = int64_t{step} * kBitmapStep;
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) {
            const bool inside = k0 + 16 * t < a.k && m0 + g + 8 * r < a.m;
            cp_async(&to.x[r][lane], inside ? rows + 8 * r * a.ldx + k0 : static_cast<const int8_t *>(a.x),
                     inside ? 16 : 0);
        }
    };

    int32_t sum[S::kRowTiles][4] = {};
    int next = warp; // step of the next group of copies
#pragma unroll
    for (int s = 0; s < S::kStages - 1; ++s, next += S::kWarps) {
        if (next < steps)
            load(s, next);
        cp_async_commit();
    }
    int stage = 0;
    for (int step = warp; step < steps; step += S::kWarps, next += S::kWarps) {
        // Every lane's copies have arrived, and every lane has read what is overwritten below.
        cp_async_wait<S::kStages - 2>();
        __syncwarp();
        if (next < steps)
            load(stage == 0 ? S::kStages - 1 : stage - 1, next);
        cp_async_commit();
        const WarpSlot &from = ring[stage * S::kWarps];
        const uint32_t map = from.maps[lane];
        uint32_t at = 8 * values_before(map);
        const Piece top = expand(from.values, at, map & 0xffffu);
        const Piece bottom = expand(from.values, at, map >> 16);
        Piece x[S::kRowTiles];
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r)
            x[r] = from.x[r][lane];
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
            const uint32_t w[4] = {top.w[half], bottom.w[half], top.w[half + 1], bottom.w[half + 1]};
#pragma unroll
            for (int r = 0; r < S::kRowTiles; ++r)
                mma_m16n8k32(sum[r], w, x[r].w[half], x[r].w[half + 1]);
        }
        stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }

    // No copy may land on the sums.
    cp_async_wait<0>();
    __syncthreads();
    auto *parts = reinterpret_cast<int32_t *>(dynamic_shared());
    int32_t *mine = parts + warp * S::kRows * S::kPitch;
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            mine[(8 * r + 2 * t + i % 2) * S::kPitch + g + i / 2 * 8] = sum[r][i];
    }
    __syncthreads();
    store_tile<int32_t, S::kRows, kBitmapOutputs, S::kPitch, S::kWarps, S::kWarps * 32>(
        tile_store(a), parts, [&](int r) { return m0 + r; }, tile * kBitmapOutputs);
}

template <class S> int launch(const Int8Linear &a, void *stream) {
    const BitmapLayout l = bitmap_layout(a.n, a.k);
    const int64_t blocks = l.tiles * div_up(a.m, S::kRows);
    if (blocks >= int64_t{1} << 31)
        return kBadArgument;
    return launch_shared<&bitmap_kernel<S>>(static_cast<unsigned>(blocks), S::kWarps * 32, S::kShared, stream,
                                            a, l);
}

} // namespace

#define TAUTORCH_DEFINE(name, row_tiles, warps, stages)                                                      \
    int sparse_linear_##name(const Int8Linear &a, void *stream) {                                            \
        return launch<Bitmap<row_tiles, warps, stages>>(a, stream);                                          \
    }
TAUTORCH_SPARSE_LINEAR_BITMAP(TAUTORCH_DEFINE)
#undef TAUTORCH_DEFINE

} // namespace tautorch::cuda
