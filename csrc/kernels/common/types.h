// Types every CPU kernel shares. Functions are static: a copy compiled for a wide instruction set must not be
// linked into another file.
#pragma once

#include "kernels/common/dtype.h"

namespace tautorch {

constexpr int kTileN = 64; // leading dimension of an accumulator tile, and the widest weight panel

// How quantised activations are laid out for a micro-kernel: q + 128 in a byte (VNNI multiplies unsigned
// by signed), q in 16 bits (plain AVX2, where vpmaddubsw would saturate), or q in a byte (Arm).
enum class ActKind : int32_t { u8_shifted = 0, s16 = 1, i8 = 2 };
static inline int64_t act_bytes(ActKind k) { return k == ActKind::s16 ? 2 : 1; }
static inline int32_t act_shift(ActKind k) { return k == ActKind::u8_shifted ? 128 : 0; }

static inline void prefetch_to_write(const char *p) {
#if defined(__x86_64__)
    asm volatile("prefetchw %0" : : "m"(*p)); // __builtin_prefetch is one to read without an option
#else
    __builtin_prefetch(p, 1);
#endif
}

// What happens to a tile of accumulators on its way out:
//   y = activation((acc + correction * colsum[n]) * row_scale[m] * w_scale[n] + addend[m][n] + bias[n])
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
    // Floats to add before the bias, [line] of the tile alone, whole panels wide (not along_m, not i32 out).
    const float *addend = nullptr; // or null
    int64_t addend_stride = kTileN;
};

} // namespace tautorch
