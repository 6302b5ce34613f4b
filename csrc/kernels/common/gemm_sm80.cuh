// Products of packed weights with rows of int8, and of 2:4 weights with rows of bf16 and fp16, by mma.sync
// and mma.sp.sync: one main loop for dense and 2:4 weights, and for rows that are a matrix's and rows that
// are the windows of an image.
//
// The weights are the A operand, as mma.sp wants of a sparse one. They are packed in the order in which they
// are used: units of 64 outputs by 64 elements of K, in which every lane finds its fragments 16 bytes at a
// time (of 16-bit elements 64 by 32, which are the same bytes, and only the places differ). Rows go through
// shared memory in lines of 64 bytes, whose 16-byte pieces are swizzled so that ldmatrix meets every bank
// once. A ring of stages is filled by cp.async; one barrier a stage.
#pragma once

#include "kernels/common/cuda_launch.cuh"
#include "kernels/common/gemm_pack_cuda.h"
#include "kernels/common/mma_sm80.cuh"
#include "kernels/common/tile_store.cuh"

namespace tautorch::cuda {

struct alignas(16) GemmPiece {
    uint32_t w[4];
};

// ---- weights ----

struct DenseUnits {
    using Sum = int32_t;
    static constexpr int kPieces = kDenseUnit / 16;
    GemmPiece a[4][2];
    __device__ __forceinline__ void load(const GemmPiece *unit, int lane) {
#pragma unroll
        for (int o = 0; o < 4; ++o) {
            a[o][0] = unit[(2 * o) * 32 + lane];
            a[o][1] = unit[(2 * o + 1) * 32 + lane];
        }
    }
    __device__ __forceinline__ void multiply(int32_t (&d)[4], int o, const uint32_t (&b)[4]) const {
        mma_m16n8k32(d, a[o][0].w, b[0], b[1]);
        mma_m16n8k32(d, a[o][1].w, b[2], b[3]);
    }
};

struct SparseUnits {
    using Sum = int32_t;
    static constexpr int kPieces = kSparseUnit / 16;
    GemmPiece a[4], places;
    __device__ __forceinline__ void load(const GemmPiece *unit, int lane) {
#pragma unroll
        for (int o = 0; o < 4; ++o)
            a[o] = unit[o * 32 + lane];
        places = unit[4 * 32 + lane];
    }
    __device__ __forceinline__ void multiply(int32_t (&d)[4], int o, const uint32_t (&b)[4]) const {
        mma_sp_m16n8k64(d, a[o].w, b, places.w[o]);
    }
};

// bf16 or fp16.
template <bool kBf16> struct SparseFloatUnits {
    using Sum = float;
    static constexpr int kPieces = kSparseFloatUnit / 16;
    struct alignas(8) Places {
        uint32_t w[2]; // of two tiles each
    };
    GemmPiece a[4];
    Places places;
    __device__ __forceinline__ void load(const GemmPiece *unit, int lane) {
#pragma unroll
        for (int o = 0; o < 4; ++o)
            a[o] = unit[o * 32 + lane];
        places = reinterpret_cast<const Places *>(unit + 4 * 32)[lane];
    }
    __device__ __forceinline__ void multiply(float (&d)[4], int o, const uint32_t (&b)[4]) const {
        if (o % 2 == 0)
            mma_sp_m16n8k32<kBf16, 0>(d, a[o].w, b, places.w[o / 2]);
        else
            mma_sp_m16n8k32<kBf16, 1>(d, a[o].w, b, places.w[o / 2]);
    }
};

// ---- rows ----

// Rows of a matrix. Pieces that begin past K are not read; the last may take in what follows K, where weights
// are 0.
struct MatrixRows {
    const int8_t *x; // on 16 bytes
    int64_t ldx;     // a multiple of 16
    int64_t rows, k;

    struct Cursor {
        const int8_t *row; // null: outside
    };
    __device__ __forceinline__ Cursor at(int64_t row) const { return {row < rows ? x + row * ldx : nullptr}; }
    // Where along K: from k0 on, a step of 64 further at every call of advance().
    struct Walk {
        int k;
    };
    __device__ __forceinline__ Walk begin(int k0) const { return {k0}; }
    __device__ __forceinline__ void advance(Walk &w) const { w.k += kGemmStep; }
    // 16 elements of K, or null for zeros.
    __device__ __forceinline__ const int8_t *piece(const Cursor &c, const Walk &w) const {
        return c.row != nullptr && w.k < k ? c.row + w.k : nullptr;
    }
    // How many bytes of a piece are read; the rest is 0.
    __device__ __forceinline__ int bytes(const Walk &) const { return 16; }
};

// Rows of 16-bit floats, in bytes. What follows K is not read: it may be NaN, which no weight of 0 undoes.
struct FloatRows : MatrixRows {
    __device__ __forceinline__ int bytes(const Walk &w) const {
        return k - w.k < 16 ? static_cast<int>(k - w.k) : 16;
    }
};

// Windows of an image [batch, height, width, channels]; a row of the product is an output pixel, K runs over
// rows and columns of the window, then channels.
struct ImageRows {
    const int8_t *x;             // on 16 bytes
    const int8_t *outside;       // 16 bytes of what lies around the image; null: 0
    int height, width, channels; // channels a multiple of 16
    int taps_h, taps_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    int out_h, out_w;
    int64_t rows; // batch * out_h * out_w

    struct Cursor {
        const int8_t *sample; // null: no such pixel
        int h, w;             // of the window's first tap
    };
    __device__ __forceinline__ Cursor at(int64_t row) const {
        if (row >= rows)
            return {nullptr, 0, 0};
        const int64_t sample = row / (int64_t{out_h} * out_w);
        const int pixel = static_cast<int>(row % (int64_t{out_h} * out_w));
        return {x + sample * height * width * channels, pixel / out_w * stride_h - padding_h,
                pixel % out_w * stride_w - padding_w};
    }
    struct Walk {
        int channel, tap_h, tap_w;
    };
    // A step crosses taps seldom, so they are counted rather than divided for.
    __device__ __forceinline__ void settle(Walk &w) const {
        while (w.channel >= channels) {
            w.channel -= channels;
            if (++w.tap_w == taps_w) {
                w.tap_w = 0;
                ++w.tap_h;
            }
        }
    }
    __device__ __forceinline__ Walk begin(int k0) const {
        Walk w{k0, 0, 0};
        settle(w);
        return w;
    }
    __device__ __forceinline__ void advance(Walk &w) const {
        w.channel += kGemmStep;
        settle(w);
    }
    __device__ __forceinline__ const int8_t *piece(const Cursor &c, const Walk &w) const {
        if (c.sample == nullptr || w.tap_h >= taps_h)
            return nullptr;
        const int row = c.h + w.tap_h * dilation_h, column = c.w + w.tap_w * dilation_w;
        if (row < 0 || row >= height || column < 0 || column >= width)
            return outside;
        return c.sample + (int64_t{row} * width + column) * channels + w.channel;
    }
    __device__ __forceinline__ int bytes(const Walk &) const { return 16; }
};

// ---- the product ----

template <class Units, class Rows, int kWarpsN, int kWarpsM, int kRowTiles, int kStages_> struct GemmShape {
    using UnitsType = Units;
    using RowsType = Rows;
    static constexpr int kAlongN = kWarpsN, kAlongM = kWarpsM, kTiles = kRowTiles, kStages = kStages_;
    static constexpr int kThreads = kWarpsN * kWarpsM * 32;
    static constexpr int kOutputs = 64 * kWarpsN, kTileRows = 8 * kRowTiles * kWarpsM;
    static constexpr int kWeightPieces = kWarpsN * Units::kPieces, kRowPieces = kTileRows * 4;
    static constexpr int kStagePieces = kWeightPieces + kRowPieces;
    static constexpr int kRing = kStages * kStagePieces * 16;
    // Sums leave 16 rows of a warp at a time. The pitch spreads a fragment's stores over the banks.
    static constexpr int kPitch = kOutputs + 4, kPartRows = 16 * kWarpsM;
    static_assert(kRowTiles % 2 == 0 && kRowPieces % kThreads == 0);
    static_assert(kPartRows * kPitch * 4 <= kRing, "a part of the sums does not fit into the ring");
    static_assert(kRing <= 99 * 1024, "compute capability 8.6 and 8.9 have no more");
};

struct GemmWeights {
    const uint8_t *units; // [groups of 64 outputs][steps of 64][unit], on 16 bytes
    int groups, steps;
};

// Tile `id` of tiles_m x tiles_n: 8 tiles of rows take turns, so that neighbours share weights and rows in
// L2.
struct GemmTile {
    int64_t m, n;
};
__device__ __forceinline__ GemmTile gemm_tile(unsigned id, unsigned tiles_m, unsigned tiles_n) {
    const unsigned band = id / (8 * tiles_n), in_band = id % (8 * tiles_n);
    const unsigned left = tiles_m - 8 * band, height = left < 8 ? left : 8;
    return {8 * band + in_band % height, in_band / height};
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_kernel(const GemmWeights weights, const typename S::RowsType rows, const TileStore store) {
    using Units = typename S::UnitsType;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_n = warp % S::kAlongN, warp_m = warp / S::kAlongN;
    const auto tiles_m = static_cast<unsigned>((store.m + S::kTileRows - 1) / S::kTileRows);
    const auto tiles_n = static_cast<unsigned>((store.n + S::kOutputs - 1) / S::kOutputs);
    const GemmTile tile = gemm_tile(blockIdx.x, tiles_m, tiles_n);
    const int64_t m0 = tile.m * S::kTileRows, n0 = tile.n * S::kOutputs;
    GemmPiece *ring = reinterpret_cast<GemmPiece *>(dynamic_shared());

    // This thread's pieces of the rows: always the same quarter of a line, of rows kThreads / 4 apart.
    constexpr int kOwn = S::kRowPieces / S::kThreads;
    const int quarter = threadIdx.x % 4;
    typename S::RowsType::Cursor cursors[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
        cursors[i] = rows.at(m0 + threadIdx.x / 4 + i * (S::kThreads / 4));

    typename S::RowsType::Walk walk = rows.begin(quarter * 16);

    // Of every step once, in order.
    const auto load = [&](int stage, int step) {
        GemmPiece *to = ring + stage * S::kStagePieces;
#pragma unroll
        for (int i = 0; i < (S::kWeightPieces + S::kThreads - 1) / S::kThreads; ++i) {
            const int p = threadIdx.x + i * S::kThreads;
            if (p < S::kWeightPieces) {
                // Past the last group its values are read again, for outputs that are not stored.
                const int wanted = static_cast<int>(tile.n) * S::kAlongN + p / Units::kPieces;
                const int group = wanted < weights.groups ? wanted : weights.groups - 1;
                const int64_t unit = int64_t{group} * weights.steps + step;
                cp_async_once(to + p, weights.units + (unit * Units::kPieces + p % Units::kPieces) * 16, 16);
            }
        }
        to += S::kWeightPieces;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int line = threadIdx.x / 4 + i * (S::kThreads / 4);
            const int8_t *from = rows.piece(cursors[i], walk);
            cp_async(to + line * 4 + (quarter ^ line / 2 % 4), from != nullptr ? from : rows.x,
                     from != nullptr ? rows.bytes(walk) : 0);
        }
        rows.advance(walk);
    };

    using Sum = typename Units::Sum;
    Sum sum[4][S::kTiles][4] = {};
#pragma unroll
    for (int s = 0; s < S::kStages - 1; ++s) {
        if (s < weights.steps)
            load(s, s);
        cp_async_commit();
    }
    // Of a line's 4 pieces lane / 8 is this lane's to point at, of the 8 lines of a tile lane % 8.
    const int line = warp_m * 8 * S::kTiles + lane % 8, piece = lane / 8 ^ lane % 8 / 2;
    int stage = 0;
    for (int step = 0; step < weights.steps; ++step) {
        cp_async_wait<S::kStages - 2>();
        // Everybody's pieces of this stage are there, and nobody reads the stage that is filled next.
        __syncthreads();
        if (const int ahead = step + S::kStages - 1; ahead < weights.steps)
            load(stage == 0 ? S::kStages - 1 : stage - 1, ahead);
        cp_async_commit();
        const GemmPiece *from = ring + stage * S::kStagePieces;
        Units units;
        units.load(from + warp_n * Units::kPieces, lane);
        from += S::kWeightPieces;
#pragma unroll
        for (int r = 0; r < S::kTiles; ++r) {
            uint32_t b[4];
            ldmatrix_x4(b, from + (line + 8 * r) * 4 + piece);
#pragma unroll
            for (int o = 0; o < 4; ++o)
                units.multiply(sum[o][r], o, b);
        }
        stage = stage + 1 == S::kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();

    Sum *parts = reinterpret_cast<Sum *>(dynamic_shared());
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < S::kTiles / 2; ++half) {
        __syncthreads(); // the ring, then the part before, have been read
#pragma unroll
        for (int o = 0; o < 4; ++o) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    parts[(16 * warp_m + 8 * r + 2 * t + i % 2) * S::kPitch + 64 * warp_n + 16 * o + g +
                          i / 2 * 8] = sum[o][2 * half + r][i];
            }
        }
        __syncthreads();
        store_tile<Sum, S::kPartRows, S::kOutputs, S::kPitch, 1, S::kThreads>(
            store, parts, [&](int r) { return m0 + r / 16 * (8 * S::kTiles) + 16 * half + r % 16; }, n0);
    }
}

template <class S>
int launch_gemm(const GemmWeights &weights, const typename S::RowsType &rows, const TileStore &store,
                void *stream) {
    const int64_t tiles = div_up(store.m, S::kTileRows) * div_up(store.n, S::kOutputs);
    if (tiles >= int64_t{1} << 31 || 8 * div_up(store.n, S::kOutputs) >= int64_t{1} << 31)
        return -1; // kBadArgument
    return launch_shared<&gemm_kernel<S>>(static_cast<unsigned>(tiles), S::kThreads, S::kRing, stream,
                                          weights, rows, store);
}

} // namespace tautorch::cuda
