// Where the rows of a product come from: a matrix, or the pixels of an image under each tap of a filter
// (implicit GEMM: pointers, no copy of overlapping patches).
#pragma once

#include "core/parallel.h"
#include "kernels/common/gemm.h"

#include <atomic>

namespace tautorch {

struct Geometry {
    int64_t batch = 0, channels = 0, height = 0, width = 0;
    int64_t kh = 1, kw = 1, sh = 1, sw = 1, ph = 0, pw = 0, dh = 1, dw = 1;
    int64_t out_height() const { return (height + 2 * ph - dh * (kh - 1) - 1) / sh + 1; }
    int64_t out_width() const { return (width + 2 * pw - dw * (kw - 1) - 1) / sw + 1; }
    int64_t out_pixels() const { return out_height() * out_width(); }
};

// The form operands take: ActKind's, or floats. Sparse and depthwise int8 kernels take bytes.
enum class OperandKind { u8, s16, i8, f32 };
inline OperandKind operand_of(const Isa &isa, PackKind kind) {
    if (kind == PackKind::dense_f32 || kind == PackKind::dense_w8 || kind == PackKind::sparse_f32)
        return OperandKind::f32;
    if (kind == PackKind::dense_i8 && isa.act == ActKind::s16)
        return OperandKind::s16;
    return isa.act == ActKind::i8 ? OperandKind::i8 : OperandKind::u8;
}
inline int64_t operand_bytes(OperandKind k) {
    return k == OperandKind::f32 ? 4 : k == OperandKind::s16 ? 2 : 1;
}
inline int32_t operand_shift(OperandKind k) { return k == OperandKind::u8 ? 128 : 0; }
inline ActKind act_of(OperandKind k) { // not f32
    return k == OperandKind::s16 ? ActKind::s16 : k == OperandKind::i8 ? ActKind::i8 : ActKind::u8_shifted;
}

class ImagePixels;

// Prepared rows. Row m, tap t, group g starts at pointer(m, t) + g * group_stride.
struct Source {
    int64_t m = 0; // rows (output pixels) in all
    int64_t taps = 1;
    const char *data = nullptr;
    int64_t row_stride = 0;        // bytes between rows (pixels of the input image)
    int64_t group_stride = 0;      // bytes between convolution groups
    const float *scales = nullptr; // per row, or per sample; null for float operands
    int64_t rows_per_scale = 1;
    const char *padding = nullptr; // what lies outside the image, row_stride bytes
    // int8 as it is: whoever reads it turns each byte's top bit (0x80), or leaves it (0).
    uint8_t flip = 0;
    // Rows of memory that is not ours are read up to 64 bytes past their end: those that end so near to the
    // memory's own are `moved` bytes further on, where they were copied. No row before `moved_from` is there.
    const char *last_rows = nullptr, *end = nullptr;
    int64_t moved = 0, moved_from = 0;
    bool image = false;
    Geometry geometry;
    int64_t out_width = 0, out_pixels = 0;
    int64_t first = 0;                   // pixel of all samples' at data
    const ImagePixels *pixels = nullptr; // of an image that is not there yet: for ready() and whole()

    // *this with rows m0 .. m1 there: in the calling thread's scratch, until it asks for others.
    Source ready(int64_t m0, int64_t m1) const;
    // How many rows, a multiple of `unit`, each of so many threads is to make ready at a time; 0: whole() is
    // better.
    int64_t together(int64_t unit, int64_t threads) const;
    // *this with all rows there, in the calling thread's scratch; made by all threads.
    Source whole() const;

    // pointers[t * ld + r] for rows m0 .. m0 + rows of group g.
    void fill(int64_t g, int64_t m0, int rows, const void **pointers, int64_t ld) const;
    // scale[r] for the same rows; false if there are none.
    bool row_scales(int64_t m0, int rows, float *scale) const;

  private:
    void fill_image(int64_t g, int64_t m0, int rows, const void **pointers, int64_t ld) const;
};

// Rows of a matrix, quantised (or converted) into thread-local scratch of the calling thread; float rows
// that need no conversion are used where they are. kr: whole groups a row is padded to.
Source matrix_source(const Isa &isa, const ActQuant &q, OperandKind kind, const void *x, int64_t stride,
                     int64_t m, int64_t k, int64_t kr);

// Rows m0 .. m0 + rows of a matrix, prepared in the given scratch of the calling thread, without more
// threads.
Source block_source(const Isa &isa, const ActQuant &q, OperandKind kind, const void *x, int64_t stride,
                    int64_t m0, int64_t rows, int64_t k, int64_t kr, Scratch operands, Scratch scales);

// How one sample becomes operands.
struct SampleQuant {
    float inv = 0.0f, scale = 1.0f;
    int32_t zp = 0, lo = -128, hi = 127;
    bool blank = false; // write the zero point only
};
// By the scale that is given or fixed.
SampleQuant quant_of(const ActQuant &q, int64_t sample);
// Of every sample, by the scale of its largest element; NaN and blank where one is not finite.
void dynamic_quant(const Isa &isa, const ActQuant &q, const char *x, int64_t batch, int64_t n,
                   SampleQuant *how);

// An image [batch][channels][height][width] (or channels last) that becomes rows of channels, the channels of
// each of `groups` groups together and padded to kr.
class ImagePixels {
  public:
    ImagePixels(const Isa &isa, const ActQuant &q, OperandKind kind, const void *x, bool channels_last,
                const Geometry &geometry, int64_t groups, int64_t kr);
    // Nothing is there yet. Fixed scales: ask finite() after the product.
    Source later() const;
    // Whether no NaN or Inf was met, where only fixed scales do not know before.
    bool finite() const { return finite_.load(std::memory_order_relaxed); }
    // See Source. whole() finds NaN and Inf itself.
    Source ready(int64_t m0, int64_t m1) const;
    int64_t together(int64_t unit, int64_t threads) const;
    Source whole() const;

  private:
    void convert(int64_t from, int64_t to, char *out) const;
    void pad(char *out) const;

    const Isa &isa_;
    const ActQuant &q_;
    OperandKind kind_;
    const char *x_;
    bool channels_last_;
    Geometry g_;
    int64_t groups_, per_group_, size_, pixels_;
    Source source_;
    SampleQuant *how_ = nullptr;
    mutable std::atomic<bool> finite_{true};
};

// An int8 image in channels last (q: given) where it is: a Source of bytes, with flip where they are u8; kr
// = 1.
Source image_in_place(const ActQuant &q, OperandKind kind, const void *x, const Geometry &geometry,
                      int64_t groups);

// The output of a convolution: NCHW planes or channels-last rows.
Output image_output(const Epilogue &e, void *data, bool channels_last, const Geometry &g, int64_t outputs);

// Everything integer kinds need in their epilogue.
Epilogue with_correction(Epilogue e, const uint8_t *packed, OperandKind kind, const ActQuant &q);

} // namespace tautorch
