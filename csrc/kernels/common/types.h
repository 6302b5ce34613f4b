// Types every CPU kernel shares. Functions are static: a copy compiled for a wide instruction set must not be
// linked into another file.
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

// How quantised activations are laid out for a micro-kernel: q + 128 in a byte (VNNI multiplies unsigned
// by signed), or q in 16 bits (plain AVX2, where vpmaddubsw would saturate).
enum class ActKind : int32_t { u8_shifted = 0, s16 = 1 };
static inline int64_t act_bytes(ActKind k) { return k == ActKind::u8_shifted ? 1 : 2; }
static inline int32_t act_shift(ActKind k) { return k == ActKind::u8_shifted ? 128 : 0; }

// What happens to a tile of accumulators on its way out:
//   y = activation((acc + correction * colsum[n]) * row_scale[m] * w_scale[n] + bias[n])
// then conversion, or requantisation to int8. For float accumulators the first bracket is acc alone.
struct Epilogue {
    bool acc_float = false;
    int32_t correction = 0;          // -(shift + zero point of the activations)
    const int32_t *colsum = nullptr; // [N], sum over K of each output's weights
    const float *w_scale = nullptr;  // [N] or null for 1
    const float *bias = nullptr;     // [N] or null
    Activation activation = Activation::none;
    DType out_dtype = DType::f32; // i32: the corrected accumulators themselves
    float out_inv_scale = 1.0f;   // 1 / out_scale, one IEEE division, for i8
    int32_t out_zero_point = 0;
};

} // namespace tautorch
