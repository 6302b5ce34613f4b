// What the operators build on: quantise rows, multiply a block of rows by packed weights, write tiles.
#pragma once

#include "kernels/common/pack.h"

namespace tautorch {

constexpr int kBlockRows = 192; // rows that one pass over the weights serves
constexpr int kTileRows = 48;   // rows that share one pass of the epilogue; 48 x 64 x 4 bytes stay in L1

// How a row of activations becomes an operand.
struct ActQuant {
    enum Mode : int32_t { dynamic = 0, fixed = 1, given = 2, none = 3 } mode = dynamic;
    float scale = 1.0f;                 // fixed: of the whole tensor
    int32_t zero_point = 0;             // fixed and given
    const float *given_scale = nullptr; // given: [1] or [rows]
    int64_t given_scales = 1;
    DType dtype = DType::f32;
    // given: of row (or sample) i. Epilogues rely on NaN being the quiet one, whose low bits are 0.
    float scale_of(int64_t i) const {
        const float s = given_scale[given_scales == 1 ? 0 : i];
        return s == s ? s : __builtin_nanf("");
    }
};

// A row or tensor whose largest magnitude is less counts as zero: 127 / amax would overflow.
constexpr float kTiny = 0x1p-100f;

// Quantises `rows` rows of n elements at x (stride in elements) to out (stride out_stride bytes, padded to
// whole kr groups) and writes each row's scale. act is the operand form. A row with NaN or Inf gets scale
// NaN and zero q.
void quantize_rows(const Isa &isa, const ActQuant &q, ActKind act, const void *x, int64_t stride, int64_t m0,
                   int64_t rows, int64_t n, int64_t n_padded, uint8_t *out, int64_t out_stride,
                   float *row_scale);

// Where a tile goes. along_m: planes of rows_per_sample contiguous pixels, one per output (NCHW).
struct Output {
    Epilogue epilogue;
    void *data = nullptr;
    bool along_m = false;
    int64_t row_stride = 0;                         // elements from one m to the next (not along_m)
    int64_t plane_stride = 0;                       // along_m: from one output to the next
    int64_t rows_per_sample = 0, sample_stride = 0; // along_m
};

// Writes acc [rows][kTileN] (m-major) or, n_major, acc [cols][ld].
void store_tile(const Isa &isa, const Output &out, const void *acc, int64_t ld, bool n_major, int64_t m0,
                int rows, int64_t n0, int cols, const float *row_scale);

// y[m0 .. m0 + rows) of panels [p0, p1) of one group. pointers is [taps][ld].
void gemm_block(const Isa &isa, const uint8_t *packed, int64_t group, const void *const *pointers, int64_t ld,
                int rows, int64_t p0, int64_t p1, const Output &out, int64_t m0, const float *row_scale);
// A part of the taps, and of the inputs of each (k0 and k1 multiples of kr, or k1 the end).
struct Taps {
    int64_t tap0, tap1, k0, k1;
    bool operator==(const Taps &o) const {
        return tap0 == o.tap0 && tap1 == o.tap1 && k0 == o.k0 && k1 == o.k1;
    }
};
// What is fetched into the caches beside a product.
struct Ahead {
    const void *at = nullptr;
    int64_t bytes = 0;
};
Ahead next_panel(const uint8_t *packed, int64_t group, int64_t panel);
// The same for some taps alone. pointers are to input k0 under tap0 ... out_row: row of out for each row,
// from m0 on, or null; only where product_i8 runs and direct_output. ahead: beside the last panel.
void gemm_block_taps(const Isa &isa, const uint8_t *packed, int64_t group, const void *const *pointers,
                     int64_t ld, int rows, const Taps &taps, int64_t p0, int64_t p1, const Output &out,
                     int64_t m0, const float *row_scale, const int32_t *out_row, const Ahead &ahead);
// The same for int8 rows of h.k bytes, a multiple of kr and not 0, one after another at x; `operands` has
// room for as many. One tap, one group, where product_i8 runs. ahead: about as many bytes.
void gemm_stored(const Isa &isa, const uint8_t *packed, const char *x, char *operands, int rows, int64_t p0,
                 int64_t p1, const Output &out, int64_t m0, const float *row_scale, const Ahead &ahead);
// Whether product_i8 writes the output itself.
inline bool direct_output(const Output &out) {
    const Activation a = out.epilogue.activation;
    return !out.along_m && (a == Activation::none || a == Activation::relu);
}

// Threads that a product of this size is worth.
int64_t threads_for(int64_t macs, int64_t weight_bytes);
// How a product of m rows, n outputs and k inputs is cut: tm row chunks times tn panel chunks.
struct Split {
    int64_t tm = 1, tn = 1;
};
Split split_gemm(int64_t m, int64_t n_panels, int64_t macs, int64_t weight_bytes);

// Rows of a block, so that `rows` rows make blocks of equal size: 200 rows are two of 100, not 192 and 8.
inline int64_t block_rows(int64_t rows) {
    return rows <= kBlockRows ? kBlockRows : div_up(rows, div_up(rows, kBlockRows));
}

inline int64_t chunk_begin(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

} // namespace tautorch
