// C entry points to the emulated kernels, and the epilogue's arithmetic on arrays.
#include "emulate.h"

#include "emulate_mma.h"
#include "kernels/common/quantize_rows_cuda.h"
#include "kernels/int8_conv2d/int8_conv2d_cuda.h"
#include "kernels/int8_linear/int8_linear_epilogue.cuh"
#include "kernels/int8_linear/int8_linear_instances.h"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"
#include "kernels/sparse_linear/sparse_linear_cuda.h"

using namespace tautorch;

extern "C" int quantize_rows(const void *x, int dtype, int64_t stride_m, int64_t stride_k, int64_t m,
                             int64_t k, const float *x_scale, const int32_t *zero_point, int8_t *q,
                             int64_t ldq, float *scale) {
    return cuda::quantize_rows(
        {x, static_cast<DType>(dtype), stride_m, stride_k, m, k, x_scale, zero_point, q, ldq, scale},
        nullptr);
}

// 1: by several blocks a row.
extern "C" int quantize_rows_in_parts(const void *x, int dtype, int64_t m, int64_t k, const float *x_scale,
                                      const int32_t *zero_point, int8_t *q, int64_t ldq, float *scale,
                                      uint32_t *peaks) {
    const cuda::QuantizeRows a{
        x, static_cast<DType>(dtype), k, 1, m, k, x_scale, zero_point, q, ldq, scale, peaks};
    const int status = cuda::quantize_rows(a, nullptr);
    return status != 0 ? status : cuda::quantize_in_parts(a);
}

extern "C" int quantize_rows_after(const void *x, int dtype, int64_t stride_m, int64_t m, int64_t k,
                                   int stage, const float *weight, const float *bias, const void *gate,
                                   int64_t gate_stride_m, float eps, const float *x_scale,
                                   const int32_t *zero_point, int8_t *q, int64_t ldq, float *scale) {
    return cuda::quantize_rows_after(
        {{x, static_cast<DType>(dtype), stride_m, 1, m, k, x_scale, zero_point, q, ldq, scale},
         static_cast<cuda::RowStage>(stage),
         weight,
         bias,
         gate,
         gate_stride_m,
         eps},
        nullptr);
}

extern "C" int pack(const int8_t *weight, int64_t stride_n, int64_t n, int64_t k, uint8_t *packed) {
    return cuda::int8_linear_pack(weight, stride_n, n, k, packed, nullptr);
}

extern "C" int sums(const int8_t *weight, int64_t stride_n, int64_t n, int64_t k, int32_t *to) {
    return cuda::int8_linear_sums(weight, stride_n, n, k, to, nullptr);
}

extern "C" int64_t packed_bytes(int64_t n, int64_t k) { return cuda::pack_header(n, k).total; }

template <class Out>
static void finish(const cuda::FinishArguments &a, int64_t m, int64_t n, const int32_t *acc,
                   const float *x_scale, const float *w_scale, const int32_t *sums, const float *bias,
                   void *y) {
    const cuda::FinishArray<Out> f(a);
    for (int64_t i = 0; i < m * n; i += 4) {
        cutlass::Array<int32_t, 4> c, s;
        cutlass::Array<float, 4> xs, ws, b;
        for (int j = 0; j < 4; ++j) {
            c[j] = acc[i + j];
            s[j] = sums[(i + j) % n];
            xs[j] = x_scale[(i + j) / n];
            ws[j] = w_scale[(i + j) % n];
            b[j] = bias[(i + j) % n];
        }
        const auto out = f(c, xs, ws, s, b);
        for (int j = 0; j < 4; ++j)
            static_cast<Out *>(y)[i + j] = out[j];
    }
}

// m * n is a multiple of 4.
extern "C" void epilogue(int64_t m, int64_t n, const int32_t *acc, const float *x_scale, const float *w_scale,
                         const int32_t *sums, const float *bias, const int32_t *x_zero_point,
                         const float *out_scale, const int32_t *out_zero_point, int activation, int dtype,
                         void *y) {
    const cuda::FinishArguments a{x_zero_point, out_scale, out_zero_point,
                                  static_cast<Activation>(activation), static_cast<DType>(dtype)};
    const auto run = size_of(a.out_dtype) == 4   ? &finish<int32_t>
                     : size_of(a.out_dtype) == 2 ? &finish<uint16_t>
                                                 : &finish<int8_t>;
    run(a, m, n, acc, x_scale, w_scale, sums, bias, y);
}

extern "C" void copies_are_late(int late) { emulated::late_copies = late != 0; }

namespace tautorch::cuda {
#define TAUTORCH_DECLARE(name, ...) int int8_linear_##name(const Int8Linear &, void *);
TAUTORCH_INT8_LINEAR_STREAM(TAUTORCH_DECLARE)
TAUTORCH_INT8_LINEAR_WEIGHT_ONLY(TAUTORCH_DECLARE)
#undef TAUTORCH_DECLARE
} // namespace tautorch::cuda

extern "C" int linear(const char *name, int64_t m, int64_t n, int64_t k, const void *x, int x_dtype,
                      int64_t ldx, const int8_t *weight, int64_t ldw, const int32_t *sums,
                      const float *x_scale, int64_t x_scales, const float *w_scale, const float *bias,
                      const int32_t *x_zero_point, const float *out_scale, const int32_t *out_zero_point,
                      int activation, int out_dtype, void *y, int64_t ldy) {
    const cuda::Int8Linear a{m,
                             n,
                             k,
                             x,
                             ldx,
                             static_cast<DType>(x_dtype),
                             weight,
                             ldw,
                             sums,
                             x_scale,
                             x_scales > 1,
                             w_scale,
                             bias,
                             x_zero_point,
                             out_scale,
                             out_zero_point,
                             static_cast<Activation>(activation),
                             static_cast<DType>(out_dtype),
                             y,
                             ldy,
                             nullptr,
                             0};
#define TAUTORCH_RUN(kernel, ...)                                                                            \
    if (std::strcmp(name, #kernel) == 0)                                                                     \
        return cuda::int8_linear_##kernel(a, nullptr);
    TAUTORCH_INT8_LINEAR_STREAM(TAUTORCH_RUN)
    TAUTORCH_INT8_LINEAR_WEIGHT_ONLY(TAUTORCH_RUN)
#undef TAUTORCH_RUN
    if (const auto *sparse = cuda::sparse_linear_find(name))
        return cuda::sparse_linear_run(*sparse, a, nullptr);
    return cuda::kNoKernel;
}

extern "C" int64_t units_bytes(int64_t n, int64_t k, int sparse) {
    return cuda::gemm_layout(n, k, sparse ? cuda::kSparseUnit : cuda::kDenseUnit).sums_off;
}
extern "C" int pack_dense(const int8_t *weight, int64_t ld, int64_t n, int64_t k, uint8_t *units) {
    return cuda::gemm_pack_dense(weight, ld, n, k, units, nullptr);
}
extern "C" int pack_sparse(const int8_t *values, const uint8_t *places, int64_t n, int64_t kept,
                           uint8_t *units) {
    return cuda::gemm_pack_sparse(values, places, n, kept, units, nullptr);
}
extern "C" int64_t float_units_bytes(int64_t n, int64_t k) {
    return cuda::gemm_layout(n, 2 * k, cuda::kSparseFloatUnit).sums_off;
}
extern "C" int pack_sparse_float(const uint16_t *values, const uint8_t *places, int64_t n, int64_t kept,
                                 uint8_t *units) {
    return cuda::gemm_pack_sparse_float(values, places, n, kept, units, nullptr);
}

extern "C" int64_t wgmma_bytes(int64_t n, int64_t k) { return cuda::wgmma_layout(n, k).total; }
extern "C" int pack_wgmma(const int8_t *values, const uint8_t *places, int64_t n, int64_t kept,
                          uint8_t *packed) {
    return cuda::wgmma_pack_sparse(values, places, n, kept, packed, nullptr);
}
extern "C" void bitmap_layout(int64_t n, int64_t k, int64_t *to) {
    const cuda::BitmapLayout l = cuda::bitmap_layout(n, k);
    const int64_t parts[] = {l.tiles, l.steps, l.offsets_off, l.sums_off, l.values_off};
    std::copy_n(parts, 5, to);
}
// CUTLASS's, which runs on no CPU.
namespace tautorch::cuda {
#define TAUTORCH_NONE(name, ...)                                                                             \
    int sparse_linear_##name(const Int8Linear &, void *) { return kNoKernel; }
TAUTORCH_SPARSE_LINEAR_24_SM90A(TAUTORCH_NONE)
#undef TAUTORCH_NONE
} // namespace tautorch::cuda

// shape: batch, height, width, channels, outputs; window: kh, kw, sh, sw, ph, pw, dh, dw
extern "C" int conv(const char *name, const int64_t *shape, const int64_t *window, const int8_t *x,
                    const uint8_t *units, const int32_t *sums, const float *x_scale, int64_t x_scales,
                    const float *w_scale, const float *bias, const int32_t *x_zero_point, int8_t *outside,
                    int out_dtype, void *y, int64_t ldy) {
    const auto *kernel = cuda::int8_conv2d_find(name);
    if (kernel == nullptr)
        kernel = cuda::sparse_conv2d_find(name);
    if (kernel == nullptr)
        return cuda::kNoKernel;
    const cuda::Int8Conv2d a{shape[0],
                             shape[1],
                             shape[2],
                             shape[3],
                             shape[4],
                             window[0],
                             window[1],
                             window[2],
                             window[3],
                             window[4],
                             window[5],
                             window[6],
                             window[7],
                             x,
                             units,
                             sums,
                             x_scale,
                             x_scales > 1,
                             w_scale,
                             bias,
                             x_zero_point,
                             outside,
                             nullptr,
                             nullptr,
                             Activation::none,
                             static_cast<DType>(out_dtype),
                             y,
                             ldy};
    return cuda::int8_conv2d_run(*kernel, a, nullptr);
}
