// C entry points to the emulated kernels, and the epilogue's arithmetic on arrays.
#include "emulate.h"

#include "kernels/common/quantize_rows_cuda.h"
#include "kernels/int8_linear/int8_linear_epilogue.cuh"

using namespace tautorch;

extern "C" int quantize_rows(const void *x, int dtype, int64_t stride_m, int64_t stride_k, int64_t m,
                             int64_t k, const float *x_scale, const int32_t *zero_point, int8_t *q,
                             int64_t ldq, float *scale) {
    return cuda::quantize_rows(
        {x, static_cast<DType>(dtype), stride_m, stride_k, m, k, x_scale, zero_point, q, ldq, scale},
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
    const cuda::Finish<Out> f(a);
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
