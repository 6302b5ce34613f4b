// Accumulator tile -> output: scale, bias, activation, conversion. One line at a time.
#pragma once

#include "kernels/common/quantize.h"

namespace tautorch {
namespace {

// Either a vector that runs along the line or one value for all of it.
template <bool Vector> inline vf pick(const float *p, int64_t i, int64_t n) {
    if constexpr (Vector)
        return n >= L ? load<vf>(p + i) : load_tail<DType::f32>(p + i, n);
    else
        return splat(*p);
}

struct Line {
    const void *acc;
    int64_t n;                               // elements
    const int32_t *sum;                      // column sums: along the line (along_m false) or one
    const float *w_scale, *bias, *row_scale; // null: absent
    void *out;
};

template <bool AlongM> inline vi corrected(const Epilogue &e, const Line &l, int64_t i, int64_t n) {
    const char *p = static_cast<const char *>(l.acc) + 4 * i;
    vi acc;
    if (n >= L) {
        acc = load<vi>(p);
    } else {
        acc = vi{};
        std::memcpy(&acc, p, static_cast<size_t>(4 * n));
    }
    if (e.correction != 0) {
        // Unsigned: the product may pass 2^31, the corrected sum does not.
        vu s;
        if constexpr (AlongM)
            s = (vu)splat(*l.sum);
        else
            s = n >= L ? load<vu>(l.sum + i) : as_bits(load_tail<DType::f32>(l.sum + i, n));
        acc = (vi)((vu)acc + s * static_cast<uint32_t>(e.correction));
    }
    return acc;
}

template <Activation A, bool AlongM>
inline vf finish(const Epilogue &e, const Line &l, int64_t i, int64_t n) {
    vf y;
    if (e.acc_float)
        y = pick<true>(static_cast<const float *>(l.acc), i, n);
    else
        y = __builtin_convertvector(corrected<AlongM>(e, l, i, n), vf);
    if (l.row_scale)
        y = y * pick<AlongM>(l.row_scale, i, n);
    if (l.w_scale)
        y = y * pick<!AlongM>(l.w_scale, i, n);
    if (l.bias)
        y = y + pick<!AlongM>(l.bias, i, n);
    return activate<A>(y);
}

template <DType T> inline void put(void *out, int64_t i, vf y, int64_t n) {
    constexpr int64_t e = T == DType::f32 ? 4 : 2;
    char *p = static_cast<char *>(out) + i * e;
    if (n >= L) {
        store_from_f32<T>(p, y);
    } else {
        char buf[4 * L];
        store_from_f32<T>(buf, y);
        std::memcpy(p, buf, static_cast<size_t>(n * e));
    }
}

inline void put_i8(const Epilogue &e, void *out, int64_t i, vf y, int64_t n) {
    const float lo = static_cast<float>(-128 - e.out_zero_point);
    const float hi = static_cast<float>(127 - e.out_zero_point);
    vf v = y * e.out_inv_scale;
    v = v < lo ? splat(lo) : v;
    v = v > hi ? splat(hi) : v;
    v = v == v ? v : vf{};
    const vs8 q = __builtin_convertvector(round_to_int(v) + e.out_zero_point, vs8);
    std::memcpy(static_cast<char *>(out) + i, &q, static_cast<size_t>(n >= L ? L : n));
}

template <Activation A, bool AlongM> void line(const Epilogue &e, const Line &l) {
    const auto each = [&](auto &&body) {
        int64_t i = 0;
        for (; i + L <= l.n; i += L)
            body(i, int64_t{L});
        if (i < l.n)
            body(i, l.n - i);
    };
    switch (e.out_dtype) {
    case DType::f32:
        each([&](int64_t i, int64_t n) { put<DType::f32>(l.out, i, finish<A, AlongM>(e, l, i, n), n); });
        break;
    case DType::bf16:
        each([&](int64_t i, int64_t n) { put<DType::bf16>(l.out, i, finish<A, AlongM>(e, l, i, n), n); });
        break;
    case DType::f16:
        each([&](int64_t i, int64_t n) { put<DType::f16>(l.out, i, finish<A, AlongM>(e, l, i, n), n); });
        break;
    case DType::i8:
        each([&](int64_t i, int64_t n) { put_i8(e, l.out, i, finish<A, AlongM>(e, l, i, n), n); });
        break;
    case DType::i32:
        each([&](int64_t i, int64_t n) {
            const vi q = corrected<AlongM>(e, l, i, n);
            std::memcpy(static_cast<char *>(l.out) + 4 * i, &q, static_cast<size_t>(4 * (n >= L ? L : n)));
        });
        break;
    }
}

template <bool AlongM> void run_line(const Epilogue &e, const Line &l) {
    switch (e.out_dtype == DType::i32 ? Activation::none : e.activation) {
    case Activation::none:
        return line<Activation::none, AlongM>(e, l);
    case Activation::relu:
        return line<Activation::relu, AlongM>(e, l);
    case Activation::gelu:
        return line<Activation::gelu, AlongM>(e, l);
    case Activation::gelu_tanh:
        return line<Activation::gelu_tanh, AlongM>(e, l);
    case Activation::silu:
        return line<Activation::silu, AlongM>(e, l);
    }
}

void epilogue(const Epilogue &e, const void *acc, int64_t ld, int lines, int cols, bool along_m, int64_t n0,
              const float *row_scale, void *out, int64_t line_stride) {
    const auto at = [](const auto *p, int64_t i) { return p ? p + i : p; };
    for (int r = 0; r < lines; ++r) {
        const int64_t n = along_m ? n0 + r : n0;
        Line l;
        l.acc = static_cast<const char *>(acc) + 4 * r * ld;
        l.n = cols;
        l.sum = at(e.colsum, n);
        l.w_scale = at(e.w_scale, n);
        l.bias = at(e.bias, n);
        l.row_scale = along_m ? row_scale : at(row_scale, r);
        l.out = static_cast<char *>(out) + r * line_stride * size_of(e.out_dtype);
        if (along_m)
            run_line<true>(e, l);
        else
            run_line<false>(e, l);
    }
}

} // namespace
} // namespace tautorch
