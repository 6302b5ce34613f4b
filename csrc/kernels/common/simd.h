// Vectors for one instruction set, through the compiler's vector extension. Included by isa_<name>.cpp
// after TT_LANES (32-bit lanes per vector) is defined; everything here is static, so that no copy compiled
// with wide instructions can be linked into another file.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tautorch {
namespace {

typedef float vf __attribute__((vector_size(4 * TT_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * TT_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * TT_LANES)));
typedef uint16_t vh __attribute__((vector_size(4 * TT_LANES)));
typedef int16_t vs16 __attribute__((vector_size(2 * TT_LANES)));
typedef uint16_t vu16 __attribute__((vector_size(2 * TT_LANES)));
typedef int8_t vs8 __attribute__((vector_size(TT_LANES)));
typedef uint8_t vu8 __attribute__((vector_size(TT_LANES)));

constexpr int L = TT_LANES;

template <class V> inline V load(const void *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V> inline void store(void *p, V v) { std::memcpy(p, &v, sizeof v); }
#if TT_LANES == 8
inline __m256i first_lanes(int64_t n) {
    alignas(32) static constexpr int32_t kLanes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)),
                              _mm256_load_si256(reinterpret_cast<const __m256i *>(kLanes)));
}
#endif
// The first n < L of L elements of so many bytes.
inline void store_tail(void *p, const void *elements, int64_t n, int64_t bytes) {
#if TT_LANES == 16 // a memcpy of unknown length would be a call
    const auto some = static_cast<__mmask16>((1u << n) - 1);
    if (bytes == 4)
        return _mm512_mask_storeu_epi32(p, some, _mm512_loadu_si512(elements));
    if (bytes == 2)
        return _mm256_mask_storeu_epi16(p, some, _mm256_loadu_si256(static_cast<const __m256i *>(elements)));
    return _mm_mask_storeu_epi8(p, some, _mm_loadu_si128(static_cast<const __m128i *>(elements)));
#elif TT_LANES == 8
    if (bytes == 4)
        return _mm256_maskstore_epi32(static_cast<int32_t *>(p), first_lanes(n),
                                      _mm256_loadu_si256(static_cast<const __m256i *>(elements)));
#endif
    std::memcpy(p, elements, static_cast<size_t>(n * bytes));
}

inline vf splat(float x) { return x - vf{}; } // x - 0 is x, for NaN and -0 too
inline vi splat(int32_t x) { return x - vi{}; }
inline vu as_bits(vf v) { return (vu)v; }
inline vf as_float(vu v) { return (vf)v; }
// NaN stays NaN: min and max give back their second operand then.
inline vf clamp(vf v, vf lo, vf hi) {
#if TT_LANES == 16
    return (vf)_mm512_min_ps((__m512)hi, _mm512_max_ps((__m512)lo, (__m512)v));
#elif TT_LANES == 8
    return (vf)_mm256_min_ps((__m256)hi, _mm256_max_ps((__m256)lo, (__m256)v));
#elif defined(__aarch64__)
    return (vf)vminq_f32(vmaxq_f32((float32x4_t)v, (float32x4_t)lo), (float32x4_t)hi);
#else
    v = v < lo ? lo : v;
    return v > hi ? hi : v;
#endif
}
// a * b + c, rounded once where there is an instruction for it.
inline vf fma(vf a, vf b, vf c) {
#if TT_LANES == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif TT_LANES == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
inline vf fma(vf a, float b, vf c) { return fma(a, splat(b), c); }
inline vf fma(vf a, vf b, float c) { return fma(a, b, splat(c)); }
inline vf fma(vf a, float b, float c) { return fma(a, splat(b), splat(c)); }
inline vf abs(vf v) { return as_float(as_bits(v) & 0x7fffffffu); }

// Nearest integer, ties to even, of |v| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4B400000;
inline vi round_to_int(vf v) { return (vi)(v + kMagic) - kMagicBits; }

// The same of |v| < 2^31.
inline vi nearest_int(vf v) {
#if TT_LANES == 16
    return (vi)_mm512_cvtps_epi32((__m512)v);
#elif TT_LANES == 8
    return (vi)_mm256_cvtps_epi32((__m256)v);
#elif defined(__aarch64__)
    return (vi)vcvtnq_s32_f32((float32x4_t)v);
#else
    vi q;
    for (int i = 0; i < L; ++i)
        q[i] = static_cast<int32_t>(__builtin_rintf(v[i]));
    return q;
#endif
}

template <class V> inline V largest(V a, V b) { return a > b ? a : b; }
inline uint32_t largest_lane(vu v) {
#if TT_LANES == 16
    return _mm512_reduce_max_epu32((__m512i)v);
#elif defined(__aarch64__)
    return vmaxvq_u32((uint32x4_t)v);
#else
    uint32_t m = 0;
    for (int i = 0; i < L; ++i)
        m = v[i] > m ? v[i] : m;
    return m;
#endif
}

inline float f16_to_f32(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, em = h & 0x7fff;
    uint32_t bits;
    if (em >= 0x7c00) {
        bits = sign | 0x7f800000u | (em & 0x3ff) << 13;
    } else if (em >= 0x400) {
        bits = sign | ((em + (112u << 10)) << 13);
    } else { // subnormal or zero: em * 2^-24
        const float f = static_cast<float>(em) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t f32_to_f16(float x) {
    uint32_t b;
    std::memcpy(&b, &x, 4);
    const uint32_t sign = (b >> 16) & 0x8000;
    b &= 0x7fffffff;
    if (b > 0x7f800000)
        return static_cast<uint16_t>(sign | 0x7e00);
    if (b >= 0x477ff000) // rounds past the largest half, 65504
        return static_cast<uint16_t>(sign | 0x7c00);
    if (b < 0x38800000) { // subnormal half: adding 0.5 aligns the mantissa, rounding to even
        float f;
        std::memcpy(&f, &b, 4);
        f += 0.5f;
        uint32_t r;
        std::memcpy(&r, &f, 4);
        return static_cast<uint16_t>(sign | (r - 0x3f000000));
    }
    b += 0xfff + ((b >> 13) & 1);
    return static_cast<uint16_t>(sign | ((b - (112u << 23)) >> 13));
}

inline vf load_f16(const void *p) {
#if TT_LANES == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(p)));
#elif TT_LANES == 8 && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p)));
#elif defined(__aarch64__)
    return (vf)vcvt_f32_f16(load<float16x4_t>(p));
#else
    vf v;
    for (int i = 0; i < L; ++i) {
        uint16_t h;
        std::memcpy(&h, static_cast<const char *>(p) + 2 * i, 2);
        v[i] = f16_to_f32(h);
    }
    return v;
#endif
}

inline void store_f16(void *p, vf v) {
#if TT_LANES == 16
    _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif TT_LANES == 8 && defined(__F16C__)
    _mm_storeu_si128(static_cast<__m128i *>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    store(p, vcvt_f16_f32((float32x4_t)v));
#else
    for (int i = 0; i < L; ++i) {
        const uint16_t h = f32_to_f16(v[i]);
        std::memcpy(static_cast<char *>(p) + 2 * i, &h, 2);
    }
#endif
}

// The low bytes of q. GCC 12 converts a vector of four elements to bytes one by one, and one of eight in ten
// steps.
inline vs8 low_bytes(vi q) {
#if defined(__aarch64__)
    const int16x4_t halves = vmovn_s32((int32x4_t)q);
    const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
    return load<vs8>(&four);
#elif TT_LANES == 8
    const __m256i bytes = _mm256_and_si256((__m256i)q, _mm256_set1_epi32(255));
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    const int64_t eight = _mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
    return load<vs8>(&eight);
#else
    return __builtin_convertvector(q, vs8);
#endif
}

inline vf load_bf16(const void *p) {
#if defined(__aarch64__) // as in low_bytes
    return as_float((vu)vshll_n_u16(load<uint16x4_t>(p), 16));
#else
    return as_float(__builtin_convertvector(load<vu16>(p), vu) << 16);
#endif
}
inline void store_bf16(void *p, vf v) {
    const vu b = as_bits(v);
    vu r = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    r = (v == v) ? r : (vu)(splat(int32_t{0x7fc0}));
#if defined(__aarch64__)
    store(p, vmovn_u32((uint32x4_t)r));
#else
    store(p, __builtin_convertvector(r, vu16));
#endif
}

template <DType T> inline vf load_as_f32(const void *p) {
    if constexpr (T == DType::f32)
        return load<vf>(p);
    else if constexpr (T == DType::bf16)
        return load_bf16(p);
    else
        return load_f16(p);
}
template <DType T> inline void store_from_f32(void *p, vf v) {
    if constexpr (T == DType::f32)
        store(p, v);
    else if constexpr (T == DType::bf16)
        store_bf16(p, v);
    else
        store_f16(p, v);
}

// e^x to about 1 ulp for finite results, Inf beyond them, never under 2^-126; NaN stays NaN.
inline vf exp(vf x) {
    x = clamp(x, splat(-87.33f), splat(89.0f)); // e^89 is past the largest float
    const vf t = fma(x, 1.44269504f, kMagic), n = t - kMagic;
    const vf r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));
    vf p = fma(r, 1.9875691500e-4f, 1.3981999507e-3f);
    p = fma(p, r, 8.3334519073e-3f);
    p = fma(p, r, 4.1665795894e-2f);
    p = fma(p, r, 1.6666665459e-1f);
    p = fma(p, r, 5.0000001201e-1f);
    p = fma(fma(p, r, 1.0f), r, 1.0f);
#if TT_LANES == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // Two factors, so that neither 2^128 nor a subnormal is needed on the way.
    const vi whole = (vi)t - kMagicBits, half = whole >> 1;
    const vf a = (vf)((half + 127) << 23), b = (vf)((whole - half + 127) << 23);
    return p * a * b;
#endif
}

template <Activation A> inline vf activate(vf x) {
    if constexpr (A == Activation::relu) {
        return x < 0.0f ? vf{} : x;
    } else if constexpr (A == Activation::silu) {
        return x / (1.0f + exp(-x));
    } else if constexpr (A == Activation::gelu_tanh) {
        // 0.5 (1 + tanh u) is the logistic function of 2u.
        const vf u = 1.5957691216f * (x + 0.044715f * x * x * x);
        return x / (1.0f + exp(-u));
    } else if constexpr (A == Activation::gelu) {
        // Abramowitz & Stegun 7.1.26: |error of erf| <= 1.5e-7, written for erfc(|z|) / 2, so that the
        // small tail of negative x does not cancel.
        const vf z = abs(x) * 0.70710678118f;
        const vf t = 1.0f / fma(z, 0.3275911f, 1.0f);
        vf p = fma(t, 0.5307027145f, -0.7265760135f);
        p = fma(p, t, 0.7107068705f);
        p = fma(p, t, -0.142248368f);
        p = fma(p, t, 0.127414796f);
        const vf tail = p * t * exp(-z * z);
        return x * (x < 0.0f ? tail : 1.0f - tail);
    } else {
        return x;
    }
}

} // namespace
} // namespace tautorch
