#include "kernels/common/planes.h"

#include "core/parallel.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

// Planes of one image on their way to pixels, a strip of pixels at a time.
struct Planes {
    const Isa &isa;
    OperandKind kind;
    DType dtype;
    const SampleQuant &q;
    int64_t plane, channels, step;

    bool quads() const { return kind == OperandKind::u8 && isa.quantize_quads && !q.blank; }
    bool strip(const char *x, int64_t pixels, char *out) const;
    bool turn_quads(const char *x, int64_t pixels, char *out) const;
    bool few_quads(const char *x, int64_t pixels, char *out) const;
    bool turn(const char *x, int64_t pixels, char *out) const;
    void turn_few_bytes(const char *in, int64_t pixels, char *out) const;
};

// Pixels of fewer than 16 bytes, which have no gaps, out of `wide` bytes each: a store's excess goes where
// the next pixel's do.
void close_up(const char *from, int64_t wide, int64_t channels, int64_t pixels, char *out) {
    const int64_t end = pixels * channels;
    int64_t p = 0;
    if (wide == 4)
        for (; p * channels + 4 <= end; ++p)
            std::memcpy(out + p * channels, from + p * 4, 4);
    else
        for (; p * channels + 16 <= end; ++p)
            std::memcpy(out + p * channels, from + p * 16, 16);
    for (; p < pixels; ++p)
        std::memcpy(out + p * channels, from + p * wide, static_cast<size_t>(channels));
}

// Groups of four channels, each a 32-bit word of every pixel, then words to pixels.
bool Planes::turn_quads(const char *x, int64_t pixels, char *out) const {
    alignas(64) uint32_t word[16][kPlaneStrip], last[16 * 16];
    const uint32_t *line[16];
    for (int i = 0; i < 16; ++i)
        line[i] = word[i];
    const int64_t whole = pixels / 16 * 16;
    bool finite = true;
    for (int64_t c = 0; c < channels;) {
        // 64 channels, or so many times 16; the last 16 may overlap.
        const int64_t left = channels - c, count = left >= 16 ? std::min<int64_t>(64, left / 16 * 16) : 16;
        const int64_t at = std::min(c, channels - 16);
        const int words = static_cast<int>(count / 4);
        for (int i = 0; i < words; ++i)
            finite &= isa.quantize_quads(x + (at + 4 * i) * plane, dtype, plane, 4, pixels, q.inv, q.zp, q.lo,
                                         q.hi, word[i]);
        isa.transpose_32(line, words, whole, reinterpret_cast<uint32_t *>(out + at), step / 4);
        if (whole < pixels) { // the words of 16 pixels are there
            const uint32_t *rest[16];
            for (int i = 0; i < words; ++i)
                rest[i] = line[i] + whole;
            isa.transpose_32(rest, words, 16, last, words);
            for (int64_t p = whole; p < pixels; ++p)
                std::memcpy(out + p * step + at, last + (p - whole) * words, static_cast<size_t>(count));
        }
        c = at + count;
    }
    return finite;
}

bool Planes::few_quads(const char *x, int64_t pixels, char *out) const {
    alignas(64) uint32_t word[4][kPlaneStrip], wide[kPlaneStrip * 4];
    const uint32_t *line[4];
    bool finite = true;
    for (int i = 0; i < 4; ++i) {
        const int64_t left = channels - 4 * i;
        line[i] = left > 0 ? word[i] : word[0];
        if (left > 0)
            finite &= isa.quantize_quads(x + 4 * i * plane, dtype, plane,
                                         static_cast<int>(std::min<int64_t>(4, left)), pixels, q.inv, q.zp,
                                         q.lo, q.hi, word[i]);
    }
    if (channels <= 4) {
        close_up(reinterpret_cast<const char *>(word[0]), 4, channels, pixels, out);
        return finite;
    }
    isa.transpose_32(line, 4, round_up(pixels, 16), wide, 4);
    close_up(reinterpret_cast<const char *>(wide), 16, channels, pixels, out);
    return finite;
}

// Fewer than 16 channels [c][kPlaneStrip].
void Planes::turn_few_bytes(const char *in, int64_t pixels, char *out) const {
    const uint8_t *rows[16]; // most of them anything
    alignas(64) uint8_t wide[kPlaneStrip * 16];
    for (int64_t i = 0; i < 16; ++i)
        rows[i] = reinterpret_cast<const uint8_t *>(in) + std::min(i, channels - 1) * kPlaneStrip;
    isa.transpose_u8(rows, 16, round_up(pixels, 16), wide, 16);
    close_up(reinterpret_cast<const char *>(wide), 16, channels, pixels, out);
}

// Two channels of 16 bits of each pixel to a word.
void pair_up(const char *in, int64_t pairs, char *out) {
    const auto *from = reinterpret_cast<const uint16_t *>(in);
    auto *to = reinterpret_cast<uint32_t *>(out);
    for (int64_t i = 0; i < pairs; ++i, from += 2 * kPlaneStrip, to += kPlaneStrip)
        for (int64_t p = 0; p < kPlaneStrip; ++p)
            to[p] = from[p] | uint32_t{from[kPlaneStrip + p]} << 16;
}

// Operands of each plane, then to pixels.
bool Planes::turn(const char *x, int64_t pixels, char *out) const {
    int64_t size = operand_bytes(kind), count = channels; // of what is turned
    bool finite = true;
    const char *in = x;
    int64_t ld = plane;
    if (kind != OperandKind::f32 || dtype != DType::f32) {
        ld = kPlaneStrip * size;
        char *strip = static_cast<char *>(scratch(Scratch::tile, static_cast<size_t>(2 * channels * ld)));
        for (int64_t c = 0; c < channels; ++c)
            finite &= to_operands(isa, kind, dtype, q, x + c * plane, pixels, strip + c * ld);
        in = strip;
        if (size == 2 && channels % 2 == 0 && step % 4 == 0) {
            in = strip + channels * ld;
            pair_up(strip, channels / 2, strip + channels * ld);
            size = 4, count = channels / 2, ld = 4 * kPlaneStrip;
        }
    }
    if (size == 1 && channels < 16 && step == channels) {
        turn_few_bytes(in, pixels, out);
        return finite;
    }
    const int64_t block = size == 1 || count >= 16 ? 16 : count >= 8 ? 8 : 4;
    if (size == 2 || count < block || step % size != 0) {
        for (int64_t p = 0; p < pixels; ++p)
            for (int64_t c = 0; c < count; ++c)
                std::memcpy(out + p * step + c * size, in + c * ld + p * size, static_cast<size_t>(size));
        return finite;
    }
    const void *rows[16];
    for (int64_t c = 0; c < count; c += block) {
        const int64_t at = std::min(c, count - block); // the last ones overlap
        for (int64_t i = 0; i < block; ++i)
            rows[i] = in + (at + i) * ld;
        if (size == 1)
            isa.transpose_u8(reinterpret_cast<const uint8_t *const *>(rows), 16, pixels,
                             reinterpret_cast<uint8_t *>(out) + at, step);
        else
            isa.transpose_32(reinterpret_cast<const uint32_t *const *>(rows), static_cast<int>(block), pixels,
                             reinterpret_cast<uint32_t *>(out) + at, step / 4);
    }
    return finite;
}

bool Planes::strip(const char *x, int64_t pixels, char *out) const {
    if (!quads() || (channels < 16 ? step != channels : step % 4 != 0))
        return turn(x, pixels, out);
    return channels < 16 ? few_quads(x, pixels, out) : turn_quads(x, pixels, out);
}

} // namespace

bool to_operands(const Isa &isa, OperandKind kind, DType dtype, const SampleQuant &q, const void *x,
                 int64_t n, void *out) {
    if (kind == OperandKind::f32)
        isa.to_f32(x, dtype, n, static_cast<float *>(out));
    else if (!q.blank)
        return isa.quantize(x, dtype, n, q.inv, q.zp, q.lo, q.hi, act_of(kind), out);
    else if (kind != OperandKind::s16)
        std::memset(out, q.zp + operand_shift(kind), static_cast<size_t>(n));
    else
        std::fill_n(static_cast<int16_t *>(out), n, static_cast<int16_t>(q.zp));
    return true;
}

bool planes_to_operands(const Isa &isa, OperandKind kind, DType dtype, const SampleQuant &q, const void *x,
                        int64_t plane, int64_t channels, int64_t pixels, char *out, int64_t step) {
    const Planes planes = {isa, kind, dtype, q, plane, channels, step};
    const char *from = static_cast<const char *>(x);
    bool finite = true;
    for (int64_t p = 0; channels > 0 && p < pixels; p += kPlaneStrip)
        finite &= planes.strip(from + p * size_of(dtype), std::min(kPlaneStrip, pixels - p), out + p * step);
    return finite;
}

} // namespace tautorch
