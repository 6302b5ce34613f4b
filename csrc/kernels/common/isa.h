// One table of primitives per instruction set. Operators are written once, over this table; only the
// primitives are compiled with wide-instruction flags (isa_<name>.cpp).
#pragma once

#include "kernels/common/product_i8.h"
#include "kernels/common/product_w8.h"
#include "kernels/common/strip_i8.h"

namespace tautorch {

constexpr int kTileOutputs = 128; // of an input-major tile, at most

// What sparse_i8_scaled makes of its sums: (sum + correction * colsum) * rows * outputs + bias, and relu of
// that. Pointers start at the first output; but for rows they may be null, for 0 (colsum, bias) or 1
// (outputs).
struct SparseScales {
    const float *rows; // [64]
    const float *outputs, *bias;
    const int32_t *colsum;
    int32_t correction;
    bool relu;
    int64_t count; // outputs, kTileOutputs at most; the last group of 4 may have fewer
    // What will be written next, to be fetched meanwhile: `lines` rows of line_bytes, line_step bytes apart.
    const char *line;
    int64_t line_step, line_bytes;
    int lines;
    bool turned; // leave sums as sparse_rows takes them, not as [outputs][64]
};

// Rows of int8 that sparse_i8_codes writes, from the tile's first row and output on.
struct SparseCodes {
    const Epilogue *epilogue; // of its numbers, those that SparseScales has not
    int rows;
    char *out;
    int64_t row_bytes;
};

// Float rows, x_step bytes apart, times `count` whole float panels that follow each other, with bias and
// activation none or relu, to float rows of output that begin at output n0.
struct RowsF32 {
    const char *x;
    int64_t x_step;
    int rows;
    int64_t k;
    const float *panels;
    int64_t count;
    const Epilogue *epilogue;
    int64_t n0;
    char *out;
    int64_t row_bytes;
};

struct ProductPlanes;
struct DepthwisePlanes;

struct Isa {
    const char *name;
    int32_t id;  // stored in packed weights
    ActKind act; // operand form of the dense int8 kernel
    int32_t nr;  // outputs per dense weight panel; the last panel is narrower, a multiple of nr_step
    int32_t nr_step;
    int32_t kr; // inputs interleaved in a dense int8 panel

    // Rows of a tile for a panel of `width` outputs.
    int32_t (*mr)(int32_t width);

    // acc[r][n] = sum over taps t and k of rows[t * ld + r][k] * panel[t][k][n], exact.
    // rows point at act elements, with 12 bytes more that may be read past their kr-groups; kq = number of
    // kr-groups per tap; acc is [mr][kTileN].
    void (*dot_i8)(const void *const *rows, int64_t ld, int mr, int64_t taps, int64_t kq, const int8_t *panel,
                   int width, int32_t *acc);
    // The same with float rows from element `skip` on; panel is float or (weight_i8, where there is no
    // `widen`) int8, [t][k][width]. k per tap. Written to acc, or added to it where `add`.
    void (*dot_f32)(const void *const *rows, int64_t ld, int mr, int64_t skip, int64_t taps, int64_t k,
                    const void *panel, bool weight_i8, int width, bool add, float *acc);

    void (*rows_f32)(const RowsF32 &);

    // Largest |x|; sets *finite to false if any element is NaN or Inf (then the value is meaningless).
    float (*amax)(const void *x, DType dtype, int64_t n, bool *finite);
    // out[i] = clamp(rint(x[i] * inv) + zp, lo, hi) + shift in the given form; i8 input is copied (shifted).
    // Returns whether all of x is finite; where it is not, out is meaningless. lo = -127 is that of dynamic
    // scales: x is finite then and within the bounds by its own largest value, and neither is looked at
    // again.
    bool (*quantize)(const void *x, DType dtype, int64_t n, float inv, int32_t zp, int32_t lo, int32_t hi,
                     ActKind act, void *out);
    void (*to_f32)(const void *x, DType dtype, int64_t n, float *out);

    // rows x cols tile, acc [row][ld]. Lines run along outputs (along_m false: line = one row m, columns
    // n0.. ) or along rows of x (along_m true: line = one output n, columns m). row_scale holds the scale
    // of each m of the tile, or null for 1. out advances by line_stride elements per line.
    void (*epilogue)(const Epilogue &e, const void *acc, int64_t ld, int lines, int cols, bool along_m,
                     int64_t n0, const float *row_scale, void *out, int64_t line_stride);

    // out[k * ld + i] = rows[i][k] for i < w: bytes (w a multiple of 16) or 32-bit words (of 4).
    void (*transpose_u8)(const uint8_t *const *rows, int w, int64_t k, uint8_t *out, int64_t ld);
    // out[k * w + i] = rows[i][k] ^ flip, w = 16 or 64.
    void (*panel_u8)(const uint8_t *const *rows, int w, int64_t k, uint8_t flip, uint8_t *out);
    void (*transpose_32)(const uint32_t *const *rows, int w, int64_t k, uint32_t *out, int64_t ld);

    // Sparse, over a panel x[k][w] (w = 16 or 64). Group g covers `gs` (1 or 4) outputs that share the
    // inputs whose 8-fold is idx[4 * start[g] .. 4 * start[g + 1]); weights are [quad][gs][4]. acc is [(g1 -
    // g0) * gs][w], written, or added to where `add`.
    void (*sparse_i8)(int gs, int w, const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                      const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc);
    // One block of a sparse_f32 pack (see sparse_f32.h) over its part of a panel x[k][w], w = 64, 32, 16 or
    // 4: adds to acc [group of the tile][gs][w]. index is uint8 where gs is 1, uint16 where it is 4.
    void (*sparse_f32)(int gs, int w, const float *x, const uint16_t *segments, int count, const void *index,
                       const float *values, float *acc);
    // In which column of an int8 panel of width 64 row r of x belongs, so that sparse_i8's interleave
    // gives back rows in order.
    const uint8_t *panel_order;

    // Runs the instruction of dot_i8 (dot_f32) on registers alone and returns the multiply-accumulates done:
    // what the arithmetic could reach, for benches.
    int64_t (*peak_i8)(int64_t rounds);
    int64_t (*peak_f32)(int64_t rounds);

    // Depthwise convolution of `channels` (at most 64) channels: acc[p][c] = sum over taps t of
    // x[p * step + taps[t] + c] * w[t / 4][c][t % 4], w having 64 channels in each of its quads of taps. x is
    // bytes, shifted where act is not i8, and 64 can be read wherever it is. acc is [pixels][kTileN].
    void (*depthwise)(const uint8_t *x, const int64_t *taps, int64_t quads, int64_t step, int pixels,
                      const int8_t *w, int channels, int32_t *acc);

    // Whether sparse_i8 and panel_u8 also take panels of 4 rows.
    bool narrow_panels = false;

    // A panel of dot_i8 times a whole block of rows, with the epilogue. Null where there is none.
    void (*product_i8)(const ProductI8 &) = nullptr;

    // sparse_i8 for groups of 4 on a panel of w = 64 whose sums are complete with it, scaled: acc is float.
    // Null where there is none.
    void (*sparse_i8_scaled)(const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                             const int8_t *values, int64_t g0, int64_t g1, bool add, int32_t *acc,
                             const SparseScales &scales) = nullptr;
    // Its turned sums, of each list [block][i][l][output]: row 16 * block + 4 * l + i. The 16 rows of a
    // block, of which `rows` are there, to rows of `cols` outputs (f32, bf16, f16), `step` bytes apart. Where
    // sparse_i8_scaled is.
    void (*sparse_rows)(const float *turned, int block, int rows, int cols, DType dtype, char *to,
                        int64_t step) = nullptr;
    // The same to int8 output, on top of sums that may be null. False, and nothing done, where an output may
    // be NaN or the output is another. Null where there is none.
    bool (*sparse_i8_codes)(const uint8_t *x, const uint32_t *start, const uint16_t *idx,
                            const int8_t *values, int64_t g0, int64_t g1, const int32_t *sums,
                            const SparseScales &scales, const SparseCodes &to) = nullptr;

    // Groups of few channels. Null where there is none.
    void (*grouped_i8)(const GroupedI8 &) = nullptr;

    // A strip of cells or of 2:4 weights times a tile of rows. Null where there is none.
    const StripKernel *strip = nullptr;

    // Float rows by int8 weights through integers. Null where there is none.
    const DigitKernels *digits = nullptr;

    // Int8 panels of dot_i8 as the floats that dot_f32 takes: [group of kr inputs][width][kr] to
    // [input][width], width at most 16. Null where dot_f32 takes bytes itself; dense_w8 packs then have kr 1.
    void (*widen)(const int8_t *panel, int64_t groups, int width, float *out) = nullptr;

    // `quantize` of at most four planes, `plane` bytes apart, to u8_shifted: byte j of out[p] is plane j's
    // pixel p. Whole groups of 16 pixels are written. Null where there is none.
    bool (*quantize_quads)(const void *x, DType dtype, int64_t plane, int planes, int64_t pixels, float inv,
                           int32_t zp, int32_t lo, int32_t hi, uint32_t *out) = nullptr;
    // The same of all channels of at most 64 pixels to a panel of sparse_i8, out[channel][64].
    bool (*quantize_panel)(const void *x, DType dtype, int64_t plane, int64_t channels, int64_t pixels,
                           float inv, int32_t zp, int32_t lo, int32_t hi, uint8_t *out) = nullptr;
    // Null where there is none, as are the others over planes.
    void (*product_planes)(const ProductPlanes &) = nullptr;
    // See window_planes.h.
    void (*words_of_runs)(const uint8_t *x, const int64_t *runs, int64_t quads, uint32_t *out) = nullptr;
    void (*depthwise_planes)(const DepthwisePlanes &) = nullptr;
    // Rows of a dense int8 product below which a thread had better take outputs than rows of its own.
    int32_t own_rows = 8;
    // Whether product_i8 takes the rows at raw as they are, for every panel, where its output is direct.
    bool signed_rows = false;
    // What makes rows even, where product_i8 is at its best only with those: `bytes` of each row under each
    // tap, tap after tap, `step` bytes from row to row. Null where pointers do as well.
    void (*even_rows)(const void *const *rows, int64_t ld, int count, int64_t taps, int64_t bytes, char *out,
                      int64_t step) = nullptr;
};

extern const Isa isa_scalar;
#if defined(__x86_64__)
extern const Isa isa_avx2;
extern const Isa isa_avxvnni;
extern const Isa isa_avx512vnni;
extern const Isa isa_amx; // the same but for dense int8 products
#elif defined(__aarch64__)
extern const Isa isa_neon;
extern const Isa isa_neon_dotprod;
extern const Isa isa_neon_i8mm;
#endif

// All tables built into this library, best last; `supported` tells whether this CPU runs it.
struct IsaEntry {
    const Isa *isa;
    bool supported;
};
const IsaEntry *isa_table(int *count);
// Null if there is no such name, or (by id) no such id.
const Isa *find_isa(const char *name);
const Isa *find_isa(int32_t id);
bool isa_supported(const Isa &isa);

} // namespace tautorch
