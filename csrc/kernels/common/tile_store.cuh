// From a tile of sums in shared memory to rows of y: the end of our own matrix kernels. The weights are the A
// operand of their multiplications, so that fragments run down the outputs; through shared memory they come
// out along the rows of y.
#pragma once

#include "kernels/common/finish.cuh"

namespace tautorch::cuda {

// Where sums go, and by what they are scaled. Vectors may have any alignment, and are not read past n.
struct TileStore {
    int64_t m, n;
    const float *x_scale;   // null: 1
    int64_t rows_per_scale; // 0: one scale for all
    const float *w_scale;   // null: 1
    const int32_t *sums;
    const float *bias;
    FinishArguments finish;
    void *y;
    int64_t ldy;
};

template <class T> struct alignas(4 * sizeof(T)) Four {
    T v[4];
    __device__ T &operator[](int i) { return v[i]; }
    __device__ const T &operator[](int i) const { return v[i]; }
};

template <class T>
__device__ __forceinline__ Four<T> column_values(const T *from, int64_t column, int64_t n, T otherwise) {
    Four<T> v;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        v[i] = from != nullptr && column + i < n ? from[column + i] : otherwise;
    return v;
}

template <class Out, class Sum, int kRows, int kColumns, int kPitch, int kParts, int kThreads, class Row>
__device__ __forceinline__ void store_tile_as(const TileStore &s, const Sum *parts, Row row_of,
                                              int64_t column0) {
    const Finish<Out> finish(s.finish);
    for (int i = threadIdx.x; i < kRows * (kColumns / 4); i += kThreads) {
        const int r = i / (kColumns / 4), c = i % (kColumns / 4) * 4;
        const int64_t row = row_of(r), column = column0 + c;
        if (row >= s.m || column >= s.n)
            continue;
        // Always in the same order: float sums do not depend on which warp came first.
        Four<Sum> sum = reinterpret_cast<const Four<Sum> *>(parts + r * kPitch + c)[0];
#pragma unroll
        for (int p = 1; p < kParts; ++p) {
            const auto more = reinterpret_cast<const Four<Sum> *>(parts + (p * kRows + r) * kPitch + c)[0];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sum[j] += more[j];
        }
        const Four<float> w_scale = column_values(s.w_scale, column, s.n, 1.f);
        const Four<float> bias = column_values(s.bias, column, s.n, 0.f);
        Four<Out> out;
        if constexpr (Sum(0.5f) == Sum(0)) { // int32_t
            const float scale = s.x_scale == nullptr    ? 1.f
                                : s.rows_per_scale == 0 ? *s.x_scale
                                                        : s.x_scale[row / s.rows_per_scale];
            const Four<float> x_scale{{scale, scale, scale, scale}};
            const Four<int32_t> sums = column_values(s.sums, column, s.n, 0);
            finish.template integers<4>(sum, x_scale, w_scale, sums, bias, out);
        } else {
            float y[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                y[j] = __fadd_rn(__fmul_rn(sum[j], w_scale[j]), bias[j]);
            finish.floats(y, out);
        }
        // ldy reaches to the next 16 bytes, so the last columns of four are there.
        *reinterpret_cast<Four<Out> *>(static_cast<Out *>(s.y) + row * s.ldy + column) = out;
    }
}

// parts: kParts tiles [kRows][kPitch] of sums to be added; kPitch a multiple of 4. Row r of them is row
// row_of(r) of y. All threads of the block, after a barrier.
template <class Sum, int kRows, int kColumns, int kPitch, int kParts, int kThreads, class Row>
__device__ __forceinline__ void store_tile(const TileStore &s, const Sum *parts, Row row_of,
                                           int64_t column0) {
    const DType type = s.finish.out_dtype;
    if (type == DType::f32 || type == DType::i32)
        store_tile_as<int32_t, Sum, kRows, kColumns, kPitch, kParts, kThreads>(s, parts, row_of, column0);
    else if (type != DType::i8)
        store_tile_as<uint16_t, Sum, kRows, kColumns, kPitch, kParts, kThreads>(s, parts, row_of, column0);
    else
        store_tile_as<int8_t, Sum, kRows, kColumns, kPitch, kParts, kThreads>(s, parts, row_of, column0);
}

} // namespace tautorch::cuda
