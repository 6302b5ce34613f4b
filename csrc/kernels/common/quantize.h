// Row quantisation. The arithmetic is the project's contract (see reference/quantizer.py): IEEE single
// precision, no contraction, rint to even; every instruction set gives the same integers.
#pragma once

#include "kernels/common/simd.h"
#if TT_LANES == 16
#include "kernels/common/interleave.h"
#endif

namespace tautorch {
namespace {

// The last n < L elements, zero-filled.
template <DType T> inline vf load_tail(const void *p, int64_t n) {
#if TT_LANES == 16
    const __mmask16 some = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (T == DType::f32)
        return (vf)_mm512_maskz_loadu_ps(some, p);
    const __m256i halves = _mm256_maskz_loadu_epi16(some, p);
    return load_as_f32<T>(&halves);
#elif TT_LANES == 8
    if constexpr (T == DType::f32)
        return (vf)_mm256_maskload_ps(static_cast<const float *>(p), first_lanes(n));
#endif
    alignas(64) char buf[4 * L] = {};
    std::memcpy(buf, p, static_cast<size_t>(n * size_of(T)));
    return load_as_f32<T>(buf);
}

// Largest |x| as bits, which order like the numbers: infinities and NaN come last. 16-bit floats are compared
// as pairs of 16-bit integers, without conversion.
template <DType T> float amax_t(const char *x, int64_t n, bool *finite) {
    constexpr int64_t e = T == DType::f32 ? 4 : 2, step = 4 * L / e;
    constexpr uint32_t sign = T == DType::f32 ? 0x7fffffffu : 0x7fff7fffu;
    const auto take = [](vu v, vu m) {
        if constexpr (T == DType::f32)
            return largest(v & sign, m);
        else
            return (vu)largest((vh)(v & sign), (vh)m);
    };
    vu m0 = {}, m1 = {};
    int64_t i = 0;
    for (; i + 2 * step <= n; i += 2 * step) {
        m0 = take(load<vu>(x + i * e), m0);
        m1 = take(load<vu>(x + (i + step) * e), m1);
    }
    for (; i + step <= n; i += step)
        m0 = take(load<vu>(x + i * e), m0);
    if (i < n) {
        vu rest = {};
        std::memcpy(&rest, x + i * e, static_cast<size_t>((n - i) * e));
        m1 = take(rest, m1);
    }
    vu m = take(m0, m1);
    if constexpr (T != DType::f32)
        m = largest(m & 0xffffu, m >> 16);
    const uint32_t bits = largest_lane(m);
    float out;
    if constexpr (T == DType::f16) {
        *finite = bits < 0x7c00u;
        return f16_to_f32(static_cast<uint16_t>(bits));
    } else {
        const uint32_t wide = T == DType::f32 ? bits : bits << 16;
        *finite = wide < 0x7f800000u;
        std::memcpy(&out, &wide, 4);
        return out;
    }
}

float amax(const void *x, DType dtype, int64_t n, bool *finite) {
    const char *p = static_cast<const char *>(x);
    if (dtype == DType::f32)
        return amax_t<DType::f32>(p, n, finite);
    if (dtype == DType::bf16)
        return amax_t<DType::bf16>(p, n, finite);
    return amax_t<DType::f16>(p, n, finite);
}

// q + add, to bytes or 16-bit words.
struct OutU8 {
    using vec = vu8;
    static constexpr int bytes = 1, shift = 128;
};
struct OutI8 {
    using vec = vs8;
    static constexpr int bytes = 1, shift = 0;
};
struct OutS16 {
    using vec = vs16;
    static constexpr int bytes = 2, shift = 0;
};
template <class Out> inline void store_q(void *out, int64_t i, vi q, int32_t add, int64_t n) {
    using V = typename Out::vec;
    V v;
    const vi sum = (vi)((vu)q + static_cast<uint32_t>(add)); // of NaN, q is the least int32
    if constexpr (Out::bytes == 1)
        v = (V)low_bytes(sum);
    else
        v = __builtin_convertvector(sum, V);
    char *p = static_cast<char *>(out) + i * Out::bytes;
    if (n >= L)
        store(p, v);
    else
        store_tail(p, &v, n, Out::bytes);
}
// Four vectors of q, with q + zp in [-128, 127].
template <class Out> inline void store_q4(void *out, int64_t i, const vi (&q)[4], int32_t zp) {
#if TT_LANES == 16
    if constexpr (Out::bytes == 1) {
        // Packing works within 128-bit lanes, which a permutation of words puts right. One store of 64 bytes
        // costs as much as one of 16.
        const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        const __m512i z = _mm512_set1_epi16(static_cast<short>(zp));
        const __m512i a = _mm512_packs_epi32((__m512i)q[0], (__m512i)q[1]);
        const __m512i b = _mm512_packs_epi32((__m512i)q[2], (__m512i)q[3]);
        const __m512i packed = _mm512_packs_epi16(_mm512_add_epi16(a, z), _mm512_add_epi16(b, z));
        _mm512_storeu_si512(static_cast<char *>(out) + i,
                            _mm512_xor_si512(_mm512_permutexvar_epi32(lanes, packed),
                                             _mm512_set1_epi8(static_cast<char>(Out::shift))));
        return;
    }
#elif TT_LANES == 8
    // As above; words are put right by halves of 128 bits.
    const __m256i z = _mm256_set1_epi16(static_cast<short>(zp));
    const __m256i a = _mm256_add_epi16(_mm256_packs_epi32((__m256i)q[0], (__m256i)q[1]), z);
    const __m256i b = _mm256_add_epi16(_mm256_packs_epi32((__m256i)q[2], (__m256i)q[3]), z);
    char *const to = static_cast<char *>(out) + i * Out::bytes;
    if constexpr (Out::bytes == 1) {
        const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), lanes);
        store(to, _mm256_xor_si256(packed, _mm256_set1_epi8(static_cast<char>(Out::shift))));
    } else {
        store(to, _mm256_permute4x64_epi64(a, 0xd8));
        store(to + 32, _mm256_permute4x64_epi64(b, 0xd8));
    }
    return;
#elif defined(__aarch64__)
    if constexpr (Out::bytes == 1) {
        const auto halves = [&](int i) {
            return vcombine_s16(vmovn_s32((int32x4_t)q[i]), vmovn_s32((int32x4_t)q[i + 1]));
        };
        // Unsigned: q + 128 may wrap around.
        const uint8x16_t bytes = vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(halves(0)), vmovn_s16(halves(2))));
        store(static_cast<char *>(out) + i,
              vaddq_u8(bytes, vdupq_n_u8(static_cast<uint8_t>(zp + Out::shift))));
        return;
    }
#endif
    for (int v = 0; v < 4; ++v)
        store_q<Out>(out, i + v * L, q[v], zp + Out::shift, L);
}

// Clamp: as asked for, and returns whether all of x is finite; out is meaningless otherwise. Without, x is
// finite and |x * inv| rounds to 127 at most.
template <DType T, class Out, bool Clamp>
bool quantize_t(const char *x, int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi, void *out) {
    constexpr int64_t e = T == DType::f32 ? 4 : 2;
    // The bounds are integers, so clamping before the rounding and before the zero point is the same.
    const float flo = static_cast<float>(lo - zp), fhi = static_cast<float>(hi - zp);
    vu bad = {};
    const auto one = [&](vf v) {
        if constexpr (Clamp)
            bad = largest(bad, as_bits(v) & 0x7fffffffu);
        v *= inv;
        if constexpr (Clamp)
            v = clamp(v, splat(flo), splat(fhi));
        return nearest_int(v);
    };
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        vi q[4];
        for (int v = 0; v < 4; ++v)
            q[v] = one(load_as_f32<T>(x + (i + v * L) * e));
        store_q4<Out>(out, i, q, zp);
    }
    for (; i < n; i += L)
        store_q<Out>(out, i, one(n - i >= L ? load_as_f32<T>(x + i * e) : load_tail<T>(x + i * e, n - i)),
                     zp + Out::shift, n - i);
    return !Clamp || largest_lane(bad) < 0x7f800000u;
}
template <DType T, class Out>
bool quantize_t(const char *x, int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi, void *out) {
    return lo == -127 ? quantize_t<T, Out, false>(x, n, inv, zp, lo, hi, out)
                      : quantize_t<T, Out, true>(x, n, inv, zp, lo, hi, out);
}

template <class Out> void copy_i8(const int8_t *x, int64_t n, void *out) {
    int64_t i = 0;
    if constexpr (Out::bytes == 1 && Out::shift == 0) {
        if (n > 0) // of nothing, x may be null
            std::memcpy(out, x, static_cast<size_t>(n));
    } else if constexpr (Out::bytes == 1) {
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
bool quantize_to(const void *x, DType dtype, int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi,
                 void *out) {
    const char *p = static_cast<const char *>(x);
    if (dtype == DType::f32)
        return quantize_t<DType::f32, Out>(p, n, inv, zp, lo, hi, out);
    if (dtype == DType::bf16)
        return quantize_t<DType::bf16, Out>(p, n, inv, zp, lo, hi, out);
    if (dtype == DType::f16)
        return quantize_t<DType::f16, Out>(p, n, inv, zp, lo, hi, out);
    copy_i8<Out>(static_cast<const int8_t *>(x), n, out);
    return true;
}

bool quantize(const void *x, DType dtype, int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi,
              ActKind act, void *out) {
#if defined(__aarch64__)
    if (act == ActKind::i8)
        return quantize_to<OutI8>(x, dtype, n, inv, zp, lo, hi, out);
#endif
    return act == ActKind::u8_shifted ? quantize_to<OutU8>(x, dtype, n, inv, zp, lo, hi, out)
                                      : quantize_to<OutS16>(x, dtype, n, inv, zp, lo, hi, out);
}

#if TT_LANES == 16
// See Isa::quantize_quads.
template <DType T, bool Clamp>
bool quads_t(const char *const (&x)[4], int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi,
             uint32_t *out) {
    constexpr int64_t e = T == DType::f32 ? 4 : 2;
    const vf flo = splat(static_cast<float>(lo - zp)), fhi = splat(static_cast<float>(hi - zp));
    const __m512i z = _mm512_set1_epi16(static_cast<short>(zp)), top = _mm512_set1_epi8(-128);
    // Packing leaves four pixels of each plane in a 128-bit lane.
    const __m512i by_pixel =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    vu bad = {};
    const auto take = [&](int64_t i, auto &&load_pixels) __attribute__((always_inline)) {
        vi q[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            vf v = load_pixels(x[j] + i * e);
            if constexpr (Clamp)
                bad = largest(bad, as_bits(v) & 0x7fffffffu);
            v *= inv;
            if constexpr (Clamp)
                v = clamp(v, flo, fhi);
            q[j] = nearest_int(v);
        }
        const __m512i a = _mm512_packs_epi32((__m512i)q[0], (__m512i)q[1]);
        const __m512i b = _mm512_packs_epi32((__m512i)q[2], (__m512i)q[3]);
        const __m512i packed = _mm512_packs_epi16(_mm512_add_epi16(a, z), _mm512_add_epi16(b, z));
        _mm512_storeu_si512(out + i, _mm512_xor_si512(_mm512_shuffle_epi8(packed, by_pixel), top));
    };
    int64_t i = 0;
    for (; i + L <= n; i += L)
        take(i, [](const char *p) { return load_as_f32<T>(p); });
    if (i < n)
        take(i, [&](const char *p) { return load_tail<T>(p, n - i); });
    return !Clamp || largest_lane(bad) < 0x7f800000u;
}

// 64 pixels of four planes of bytes.
inline void quads_i8(const char *const (&x)[4], int64_t n, uint32_t *out) {
    const __m512i top = _mm512_set1_epi8(-128);
    for (int64_t i = 0; i < n; i += 64) {
        const __mmask64 some = n - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
        __m512i r[4], t[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            r[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, x[j] + i), top);
        interleave_bytes(r[0], r[1], r[2], r[3], t); // part l of t[j]: pixels 16 l + 4 j + 0 .. 3
        const __m512i l01 = _mm512_shuffle_i32x4(t[0], t[1], 0x44),
                      h01 = _mm512_shuffle_i32x4(t[0], t[1], 0xee),
                      l23 = _mm512_shuffle_i32x4(t[2], t[3], 0x44),
                      h23 = _mm512_shuffle_i32x4(t[2], t[3], 0xee);
        _mm512_storeu_si512(out + i, _mm512_shuffle_i32x4(l01, l23, 0x88));
        if (n - i > 16)
            _mm512_storeu_si512(out + i + 16, _mm512_shuffle_i32x4(l01, l23, 0xdd));
        if (n - i > 32)
            _mm512_storeu_si512(out + i + 32, _mm512_shuffle_i32x4(h01, h23, 0x88));
        if (n - i > 48)
            _mm512_storeu_si512(out + i + 48, _mm512_shuffle_i32x4(h01, h23, 0xdd));
    }
}

// See Isa::quantize_panel: packing four vectors leaves pixels in the order that sparse_i8 wants.
template <DType T, bool Clamp>
bool panel_t(const char *x, int64_t plane, int64_t channels, int64_t n, float inv, int32_t zp, int32_t lo,
             int32_t hi, uint8_t *out) {
    constexpr int64_t e = T == DType::f32 ? 4 : 2;
    const vf flo = splat(static_cast<float>(lo - zp)), fhi = splat(static_cast<float>(hi - zp));
    const __m512i z = _mm512_set1_epi16(static_cast<short>(zp)), top = _mm512_set1_epi8(-128);
    vu bad = {};
    const auto take = [&](auto &&load_pixels) __attribute__((always_inline)) {
        for (int64_t c = 0; c < channels; ++c, x += plane, out += 64) {
            vi q[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                vf v = load_pixels(x, j);
                if constexpr (Clamp)
                    bad = largest(bad, as_bits(v) & 0x7fffffffu);
                v *= inv;
                if constexpr (Clamp)
                    v = clamp(v, flo, fhi);
                q[j] = nearest_int(v);
            }
            const __m512i a = _mm512_packs_epi32((__m512i)q[0], (__m512i)q[1]);
            const __m512i b = _mm512_packs_epi32((__m512i)q[2], (__m512i)q[3]);
            const __m512i packed = _mm512_packs_epi16(_mm512_add_epi16(a, z), _mm512_add_epi16(b, z));
            _mm512_storeu_si512(out, _mm512_xor_si512(packed, top));
        }
    };
    if (n == 4 * L)
        take([](const char *p, int j) { return load_as_f32<T>(p + j * L * e); });
    else
        take([n](const char *p, int j) {
            const int64_t left = n - j * L;
            return left >= L  ? load_as_f32<T>(p + j * L * e)
                   : left > 0 ? load_tail<T>(p + j * L * e, left)
                              : vf{};
        });
    return !Clamp || largest_lane(bad) < 0x7f800000u;
}

bool quantize_panel(const void *x, DType dtype, int64_t plane, int64_t channels, int64_t n, float inv,
                    int32_t zp, int32_t lo, int32_t hi, uint8_t *out) {
    const char *from = static_cast<const char *>(x);
    if (dtype == DType::i8) {
        const __m512i top = _mm512_set1_epi8(-128);
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __mmask64 some = n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
        for (int64_t c = 0; c < channels; ++c, from += plane, out += 64) {
            const __m512i pixels = _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, from), top);
            _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, pixels));
        }
        return true;
    }
    const auto run = [&](auto &&some) { return some(from, plane, channels, n, inv, zp, lo, hi, out); };
    const bool clamped = lo != -127;
    if (dtype == DType::f32)
        return clamped ? run(panel_t<DType::f32, true>) : run(panel_t<DType::f32, false>);
    if (dtype == DType::bf16)
        return clamped ? run(panel_t<DType::bf16, true>) : run(panel_t<DType::bf16, false>);
    return clamped ? run(panel_t<DType::f16, true>) : run(panel_t<DType::f16, false>);
}

bool quantize_quads(const void *x, DType dtype, int64_t plane, int planes, int64_t n, float inv, int32_t zp,
                    int32_t lo, int32_t hi, uint32_t *out) {
    const char *from[4];
    for (int j = 0; j < 4; ++j)
        from[j] = static_cast<const char *>(x) + (j < planes ? j : planes - 1) * plane;
    if (dtype == DType::i8) {
        quads_i8(from, n, out);
        return true;
    }
    const auto run = [&](auto &&some) { return some(from, n, inv, zp, lo, hi, out); };
    const bool clamped = lo != -127;
    if (dtype == DType::f32)
        return clamped ? run(quads_t<DType::f32, true>) : run(quads_t<DType::f32, false>);
    if (dtype == DType::bf16)
        return clamped ? run(quads_t<DType::bf16, true>) : run(quads_t<DType::bf16, false>);
    return clamped ? run(quads_t<DType::f16, true>) : run(quads_t<DType::f16, false>);
}
#endif

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
