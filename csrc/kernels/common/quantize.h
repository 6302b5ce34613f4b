// Row quantisation. The arithmetic is the project's contract (see reference/quantizer.py): IEEE single
// precision, no contraction, rint to even; every instruction set gives the same integers.
#pragma once

#include "kernels/common/simd.h"

namespace tautorch {
namespace {

// The last n < L elements, zero-filled.
template <DType T> inline vf load_tail(const void *p, int64_t n) {
    alignas(64) char buf[4 * L] = {};
    std::memcpy(buf, p, static_cast<size_t>(n * size_of(T)));
    return load_as_f32<T>(buf);
}

template <DType T> float amax_t(const char *x, int64_t n, bool *finite) {
    constexpr int64_t e = T == DType::f32 ? 4 : 2;
    vf m0 = {}, m1 = {}, bad = {};
    int64_t i = 0;
    const auto take = [&bad](vf v, vf m) {
        bad += v - v; // 0 for finite v, NaN otherwise
        v = abs(v);
        return v > m ? v : m;
    };
    for (; i + 2 * L <= n; i += 2 * L) {
        m0 = take(load_as_f32<T>(x + i * e), m0);
        m1 = take(load_as_f32<T>(x + (i + L) * e), m1);
    }
    for (; i < n; i += L)
        m0 = take(n - i >= L ? load_as_f32<T>(x + i * e) : load_tail<T>(x + i * e, n - i), m0);
    m0 = m0 > m1 ? m0 : m1;
    float m = 0, b = 0;
    for (int l = 0; l < L; ++l) {
        m = m0[l] > m ? m0[l] : m;
        b += bad[l];
    }
    *finite = b == 0;
    return m;
}

float amax(const void *x, DType dtype, int64_t n, bool *finite) {
    const char *p = static_cast<const char *>(x);
    if (dtype == DType::f32)
        return amax_t<DType::f32>(p, n, finite);
    if (dtype == DType::bf16)
        return amax_t<DType::bf16>(p, n, finite);
    return amax_t<DType::f16>(p, n, finite);
}

template <class Out> inline void store_q(void *out, int64_t i, vi q, int64_t n) {
    using V = typename Out::vec;
    const V v = __builtin_convertvector(q, V);
    char *p = static_cast<char *>(out) + i * Out::bytes;
    if (n >= L)
        store(p, v);
    else
        std::memcpy(p, &v, static_cast<size_t>(n * Out::bytes));
}
struct OutU8 {
    using vec = vu8;
    static constexpr int bytes = 1, shift = 128;
};
struct OutS16 {
    using vec = vs16;
    static constexpr int bytes = 2, shift = 0;
};

template <DType T, class Out>
void quantize_t(const char *x, int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi, void *out) {
    constexpr int64_t e = T == DType::f32 ? 4 : 2;
    // The bounds are integers, so clamping before the rounding and before the zero point is the same.
    const float flo = static_cast<float>(lo - zp), fhi = static_cast<float>(hi - zp);
    const int32_t add = zp + Out::shift;
    for (int64_t i = 0; i < n; i += L) {
        vf v = (n - i >= L ? load_as_f32<T>(x + i * e) : load_tail<T>(x + i * e, n - i)) * inv;
        v = v < flo ? splat(flo) : v;
        v = v > fhi ? splat(fhi) : v;
        store_q<Out>(out, i, round_to_int(v) + add, n - i);
    }
}

template <class Out> void copy_i8(const int8_t *x, int64_t n, void *out) {
    int64_t i = 0;
    if constexpr (Out::bytes == 1) {
        // q + 128 is q with its top bit turned: whole registers of bytes, no widening.
        uint8_t *to = static_cast<uint8_t *>(out);
        for (; i + 4 * L <= n; i += 4 * L)
            store(to + i, load<vu>(x + i) ^ 0x80808080u);
        for (; i < n; ++i)
            to[i] = static_cast<uint8_t>(x[i] ^ 0x80);
    } else {
        int16_t *to = static_cast<int16_t *>(out);
        for (; i + L <= n; i += L)
            store(to + i, __builtin_convertvector(load<vs8>(x + i), vs16));
        for (; i < n; ++i)
            to[i] = x[i];
    }
}

template <class Out>
void quantize_to(const void *x, DType dtype, int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi,
                 void *out) {
    const char *p = static_cast<const char *>(x);
    if (dtype == DType::i8)
        copy_i8<Out>(static_cast<const int8_t *>(x), n, out);
    else if (dtype == DType::f32)
        quantize_t<DType::f32, Out>(p, n, inv, zp, lo, hi, out);
    else if (dtype == DType::bf16)
        quantize_t<DType::bf16, Out>(p, n, inv, zp, lo, hi, out);
    else
        quantize_t<DType::f16, Out>(p, n, inv, zp, lo, hi, out);
}

void quantize(const void *x, DType dtype, int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi,
              ActKind act, void *out) {
    if (act == ActKind::u8_shifted)
        quantize_to<OutU8>(x, dtype, n, inv, zp, lo, hi, out);
    else
        quantize_to<OutS16>(x, dtype, n, inv, zp, lo, hi, out);
}

template <DType T> void to_f32_t(const char *x, int64_t n, float *out) {
    constexpr int64_t e = T == DType::f32 ? 4 : 2;
    int64_t i = 0;
    for (; i + L <= n; i += L)
        store(out + i, load_as_f32<T>(x + i * e));
    if (i < n) {
        const vf v = load_tail<T>(x + i * e, n - i);
        std::memcpy(out + i, &v, static_cast<size_t>(4 * (n - i)));
    }
}

void to_f32(const void *x, DType dtype, int64_t n, float *out) {
    const char *p = static_cast<const char *>(x);
    if (dtype == DType::f32)
        to_f32_t<DType::f32>(p, n, out);
    else if (dtype == DType::bf16)
        to_f32_t<DType::bf16>(p, n, out);
    else
        to_f32_t<DType::f16>(p, n, out);
}

} // namespace
} // namespace tautorch
