// Accumulator tile -> output: scale, bias, activation, conversion.
//
// What is absent counts as 1 (scales) or 0 (bias, correction), so that the inner loop has no branch; the
// activation, the output's type and the accumulator's are template parameters of a whole tile.
#pragma once

#include "kernels/common/quantize.h"

namespace tautorch {
namespace {

struct Tile {
    const char *acc; // 32-bit, [line][ld]
    int64_t ld;
    int lines, cols;
    int64_t n0; // first output
    const float *row_scale;
    char *out;
    int64_t line_bytes; // of the output
};

template <DType T> inline vf load_part(const void *p, int64_t n) {
    return n >= L ? load_as_f32<T>(p) : load_tail<T>(p, n);
}
inline vf load_or(const float *p, int64_t i, int64_t n, float absent) {
    return p ? load_part<DType::f32>(p + i, n) : splat(absent);
}
inline float value_or(const float *p, int64_t i, float absent) { return p ? p[i] : absent; }

// Unsigned: correction * colsum may pass 2^31, the corrected accumulator does not.
inline vi correction_along(const Epilogue &e, int64_t i, int64_t n) {
    if (!e.correction)
        return vi{};
    return (vi)(as_bits(load_part<DType::f32>(e.colsum + i, n)) * static_cast<uint32_t>(e.correction));
}
inline vi correction_at(const Epilogue &e, int64_t i) {
    if (!e.correction)
        return vi{};
    return splat(
        static_cast<int32_t>(static_cast<uint32_t>(e.colsum[i]) * static_cast<uint32_t>(e.correction)));
}

template <bool Float> inline vf accumulated(const char *p, int64_t n, vi correction) {
    const vf raw = load_part<DType::f32>(p, n);
    if constexpr (Float)
        return raw;
    else
        return __builtin_convertvector((vi)(as_bits(raw) + (vu)correction), vf);
}

template <DType T> inline void put(char *p, vf y, int64_t n, float inv, int32_t zp, vf lo, vf hi) {
    if constexpr (T == DType::i8) {
        vf v = clamp(y * inv, lo, hi);
        v = v == v ? v : vf{};
        const vs8 q = low_bytes(round_to_int(v) + zp);
        if (n >= L)
            store(p, q);
        else
            store_tail(p, &q, n, 1);
    } else if (n >= L) {
        store_from_f32<T>(p, y);
    } else {
        alignas(64) char buf[4 * L];
        store_from_f32<T>(buf, y);
        store_tail(p, buf, n, size_of(T));
    }
}

// NV vectors of outputs from i on, all rows. A single vector may have fewer than L elements left.
template <Activation A, DType T, bool Float, bool Add, int NV>
void run_columns(const Epilogue &e, const Tile &t, int64_t i, int64_t left, float inv, int32_t zp, vf lo,
                 vf hi) {
    const int64_t n = NV > 1 ? L : left; // known to the compiler but for the last vectors
    vi correction[NV];
    vf w[NV], b[NV];
    for (int v = 0; v < NV; ++v) {
        const int64_t at = t.n0 + i + v * L;
        correction[v] = Float ? vi{} : correction_along(e, at, n);
        w[v] = load_or(e.w_scale, at, n, 1.0f);
        b[v] = load_or(e.bias, at, n, 0.0f);
    }
    const char *acc = t.acc + 4 * i;
    char *out = t.out + i * size_of(T);
    const int64_t ld = 4 * t.ld, line_bytes = t.line_bytes;
    for (int r = 0; r < t.lines; ++r, acc += ld, out += line_bytes) {
        const float scale = value_or(t.row_scale, r, 1.0f);
        for (int v = 0; v < NV; ++v) {
            vf y = accumulated<Float>(acc + 4 * v * L, n, correction[v]) * scale * w[v];
            if constexpr (Add)
                y += load_part<DType::f32>(e.addend + r * e.addend_stride + i + v * L, n);
            put<T>(out + v * L * size_of(T), activate<A>(y + b[v]), n, inv, zp, lo, hi);
        }
    }
}

template <Activation A, DType T, bool Float, bool AlongM, bool Add = false>
void run_tile(const Epilogue &e, const Tile &t) {
    const float inv = e.out_inv_scale;
    const int32_t zp = e.out_zero_point;
    const vf lo = splat(static_cast<float>(-128 - zp)), hi = splat(static_cast<float>(127 - zp));
    if constexpr (AlongM) { // a line is one output
        for (int r = 0; r < t.lines; ++r) {
            const vi correction = Float ? vi{} : correction_at(e, t.n0 + r);
            const vf w = splat(value_or(e.w_scale, t.n0 + r, 1.0f)),
                     b = splat(value_or(e.bias, t.n0 + r, 0.0f));
            const char *acc = t.acc + 4 * r * t.ld;
            char *out = t.out + r * t.line_bytes;
            for (int64_t i = 0; i < t.cols; i += L) {
                const int64_t n = t.cols - i;
                const vf y =
                    accumulated<Float>(acc + 4 * i, n, correction) * load_or(t.row_scale, i, n, 1.0f);
                put<T>(out + i * size_of(T), activate<A>(y * w + b), n, inv, zp, lo, hi);
            }
        }
        return;
    }
    // A line is one row. Four vectors of outputs at a time, row by row: going down one vector's column
    // instead would touch a new cache line, 4 KB from the last, with every store (1.7 times slower at N =
    // 1024).
    int64_t i = 0;
    for (; i + 4 * L <= t.cols; i += 4 * L)
        run_columns<A, T, Float, Add, 4>(e, t, i, L, inv, zp, lo, hi);
    for (; i < t.cols; i += L)
        run_columns<A, T, Float, Add, 1>(e, t, i, t.cols - i, inv, zp, lo, hi);
}

template <bool AlongM> void run_raw(const Epilogue &e, const Tile &t) {
    for (int r = 0; r < t.lines; ++r)
        for (int64_t i = 0; i < t.cols; i += L) {
            const int64_t n = t.cols - i;
            const vi correction = AlongM ? correction_at(e, t.n0 + r) : correction_along(e, t.n0 + i, n);
            const vu q = as_bits(load_part<DType::f32>(t.acc + 4 * (r * t.ld + i), n)) + (vu)correction;
            char *out = t.out + r * t.line_bytes + 4 * i;
            if (n >= L)
                store(out, q);
            else
                store_tail(out, &q, n, 4);
        }
}

template <Activation A, DType T, bool Float>
void by_direction(const Epilogue &e, const Tile &t, bool along_m) {
    if (along_m)
        run_tile<A, T, Float, true>(e, t);
    else
        e.addend ? run_tile<A, T, Float, false, true>(e, t) : run_tile<A, T, Float, false>(e, t);
}

template <Activation A, DType T> void by_accumulator(const Epilogue &e, const Tile &t, bool along_m) {
    e.acc_float ? by_direction<A, T, true>(e, t, along_m) : by_direction<A, T, false>(e, t, along_m);
}

template <Activation A> void by_output(const Epilogue &e, const Tile &t, bool along_m) {
    switch (e.out_dtype) {
    case DType::f32:
        return by_accumulator<A, DType::f32>(e, t, along_m);
    case DType::bf16:
        return by_accumulator<A, DType::bf16>(e, t, along_m);
    case DType::f16:
        return by_accumulator<A, DType::f16>(e, t, along_m);
    case DType::i8:
        return by_accumulator<A, DType::i8>(e, t, along_m);
    case DType::i32:
        return along_m ? run_raw<true>(e, t) : run_raw<false>(e, t);
    }
}

void epilogue(const Epilogue &e, const void *acc, int64_t ld, int lines, int cols, bool along_m, int64_t n0,
              const float *row_scale, void *out, int64_t line_stride) {
    const Tile t = {
        static_cast<const char *>(acc),    ld, lines, cols, n0, row_scale, static_cast<char *>(out),
        line_stride * size_of(e.out_dtype)};
    switch (e.activation) {
    case Activation::none:
        return by_output<Activation::none>(e, t, along_m);
    case Activation::relu:
        return by_output<Activation::relu>(e, t, along_m);
    case Activation::gelu:
        return by_output<Activation::gelu>(e, t, along_m);
    case Activation::gelu_tanh:
        return by_output<Activation::gelu_tanh>(e, t, along_m);
    case Activation::silu:
        return by_output<Activation::silu>(e, t, along_m);
    }
}

} // namespace
} // namespace tautorch
