// The codes and sizes that CPU and CUDA kernels share. Small and settled: everything in CUDA is rebuilt when
// this changes. Functions are static: a copy compiled for a wide instruction set must not be linked into
// another file.
#pragma once

#include <cstdint>

namespace tautorch {

// The numbers are part of the binding's interface.
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, i32 = 4 };
enum class Activation : int32_t { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

static inline int64_t size_of(DType t) {
    return t == DType::f32 || t == DType::i32 ? 4 : t == DType::i8 ? 1 : 2;
}
static inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
static inline int64_t div_up(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Largest K with 255 * 127 * K < 2^31: the shifted operand is at most 255, weights at most 127.
constexpr int64_t kMaxK = 66311;
// The same with weights of -128, which quantising never gives.
constexpr int64_t kMaxKLowest = 65793;

} // namespace tautorch
