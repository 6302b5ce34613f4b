// Weights packed for one kernel, and the operators run on them, for the native tests.
#pragma once

#include "support.h"

#include "kernels/common/product.h"

#include <memory>

namespace tautorch::tests {

using Packed = std::unique_ptr<Bytes>;

Packed pack_dense(const Isa &isa, PackKind kind, int64_t groups, int64_t n, int64_t k, int64_t taps,
                  const void *w, WeightStrides strides);

// Outputs in groups of gs that share their kept inputs: w [groups * n][inputs], 0 where nothing is kept;
// `keep` says which (kept zeros exist).
template <class T>
Packed pack_sparse(const Isa &isa, int gs, int64_t groups, int64_t n, int64_t k, int64_t taps,
                   const std::vector<T> &w, const std::vector<bool> &keep,
                   SparseForm form = SparseForm::automatic);

// What becomes of the sums: y = activation(acc * row scale * w_scale + bias), to any type.
struct Tail {
    DType dtype = DType::i32;
    Activation activation = Activation::none;
    std::vector<float> w_scale, bias;
    float out_scale = 1.0f;
    int32_t out_zero_point = 0;

    Epilogue epilogue() const;
    // Of a finished sum, float output types.
    float value(int64_t acc, float row_scale, int64_t output) const;
    int8_t code(float y) const;
};

ActQuant dynamic_quant(DType dtype = DType::f32);
ActQuant static_quant(float scale, int32_t zero_point, DType dtype = DType::f32);
ActQuant given_quant(const std::vector<float> &scales, int32_t zero_point);

template <class Out>
std::vector<Out> run_linear(void (*op)(const LinearArgs &), const Bytes &packed, const ActQuant &quant,
                            const void *x, int64_t stride, int64_t m, int64_t n, const Tail &tail);

// [m][n] = sum over k of q[m][k] * w[n][k], as int32.
std::vector<int32_t> matmul(const std::vector<int64_t> &q, const std::vector<int64_t> &w, int64_t m,
                            int64_t n, int64_t k);
template <class To> std::vector<To> as(const std::vector<int64_t> &v) { return {v.begin(), v.end()}; }

uint16_t bf16_of(float x);
float f16_value(uint16_t h);
uint16_t f16_of(float x);

} // namespace tautorch::tests
