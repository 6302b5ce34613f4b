#include "kernels/common/gemm.h"

#include "core/parallel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace tautorch {

void quantize_rows(const Isa &isa, const ActQuant &q, ActKind act, const void *x, int64_t stride, int64_t m0,
                   int64_t rows, int64_t n, int64_t n_padded, uint8_t *out, int64_t out_stride,
                   float *row_scale) {
    const int64_t width = act_bytes(act);
    const char *base = static_cast<const char *>(x);
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    for (int64_t r = 0; r < rows; ++r, out += out_stride) {
        const void *row = base + (m0 + r) * stride * size_of(q.dtype);
        float scale = 1.0f;
        int32_t zp = q.zero_point;
        bool finite = true, blank = false;
        if (q.mode == ActQuant::given) {
            isa.quantize(row, q.dtype, n, 1.0f, zp, -128, 127, act, out);
            scale = q.scale_of(m0 + r);
        } else if (q.mode == ActQuant::fixed) {
            scale = q.scale;
            finite = isa.quantize(row, q.dtype, n, 1.0f / scale, zp, -128, 127, act, out);
            blank = !finite;
        } else {
            const float amax = isa.amax(row, q.dtype, n, &finite);
            zp = 0;
            blank = !finite || amax < kTiny;
            if (!blank) {
                scale = amax / 127.0f;
                isa.quantize(row, q.dtype, n, 127.0f / amax, 0, -127, 127, act, out);
            }
        }
        if (blank) {
            if (act == ActKind::s16)
                std::fill_n(reinterpret_cast<int16_t *>(out), n, static_cast<int16_t>(zp));
            else
                std::memset(out, zp + act_shift(act), static_cast<size_t>(n));
        }
        if (n_padded > n) // the weights there are zero; the value only has to be defined
            std::memset(out + n * width, 0, static_cast<size_t>((n_padded - n) * width));
        row_scale[r] = finite ? scale : kNaN;
    }
}

void store_tile(const Isa &isa, const Output &out, const void *acc, int64_t ld, bool n_major, int64_t m0,
                int rows, int64_t n0, int cols, const float *row_scale) {
    alignas(64) uint32_t turned[kTileN * kTileN];
    if (n_major != out.along_m) {
        const int lines = n_major ? cols : rows, across = n_major ? rows : cols;
        const int w = static_cast<int>(round_up(lines, 4));
        const uint32_t *line[kTileN];
        for (int i = 0; i < w; ++i)
            line[i] = static_cast<const uint32_t *>(acc) + std::min(i, lines - 1) * ld;
        isa.transpose_32(line, w, across, turned, w);
        acc = turned;
        ld = w;
    }
    char *base = static_cast<char *>(out.data);
    const int64_t size = size_of(out.epilogue.out_dtype);
    if (!out.along_m) {
        isa.epilogue(out.epilogue, acc, ld, rows, cols, false, n0, row_scale,
                     base + (m0 * out.row_stride + n0) * size, out.row_stride);
        return;
    }
    for (int64_t m = m0; m < m0 + rows;) { // one sample at a time
        const int64_t sample = m / out.rows_per_sample, pixel = m % out.rows_per_sample;
        const int64_t run = std::min(m0 + rows - m, out.rows_per_sample - pixel);
        char *to = base + (sample * out.sample_stride + n0 * out.plane_stride + pixel) * size;
        isa.epilogue(out.epilogue, static_cast<const uint32_t *>(acc) + (m - m0), ld, cols,
                     static_cast<int>(run), true, n0, row_scale ? row_scale + (m - m0) : nullptr, to,
                     out.plane_stride);
        m += run;
    }
}

Ahead next_panel(const uint8_t *packed, int64_t group, int64_t panel) {
    const uint8_t *const from = panel_data(packed, group, panel + 1);
    return {from, from - panel_data(packed, group, panel)};
}

namespace {

// The distance of each row from the last, in bytes; 0 if they are not all the same.
int64_t row_step(const void *const *rows, int count) {
    if (count < 2)
        return 0;
    const auto at = [rows](int r) { return reinterpret_cast<intptr_t>(rows[r]); };
    const intptr_t step = at(1) - at(0);
    intptr_t differs = 0; // to the end, so that it goes by vectors
    for (int r = 2; r < count; ++r)
        differs |= at(r) - at(r - 1) - step;
    return differs != 0 ? 0 : step;
}

// Whether a tile had better take all panels before the next rows begin: what an output costs then weighs as
// much as its inputs. 256 inputs, the six rows of a tile and kFromL2 are fitted to Zen 4.
bool row_by_row(const Output &out, int64_t k) {
    const Epilogue &e = out.epilogue;
    return k <= 256 && !out.along_m && !e.addend && e.out_dtype == DType::f32 &&
           (e.activation == Activation::none || e.activation == Activation::relu);
}
constexpr int64_t kFromL2 = 384 * 1024; // bytes of weights read again for every six rows: of Zen 4's 1 MB
int64_t panels_at_once(const uint8_t *packed, int64_t group) {
    const int64_t panel = panel_data(packed, group, 1) - panel_data(packed, group, 0);
    return std::max<int64_t>(2, kFromL2 / std::max<int64_t>(1, panel));
}

// One panel times a block of rows through product_i8: straight to the output where that runs along rows and
// the activation is done in registers, otherwise a tile at a time through memory.
void fused_panel(const Isa &isa, ProductI8 p, const Output &out, int64_t m0, int64_t n0) {
    const Epilogue &e = out.epilogue;
    if (direct_output(out)) {
        p.row_bytes = out.row_stride * size_of(e.out_dtype);
        p.out = static_cast<char *>(out.data) + m0 * p.row_bytes + n0 * size_of(e.out_dtype);
        p.epilogue = &e;
        p.n0 = n0;
        isa.product_i8(p);
        return;
    }
    alignas(64) int32_t acc[kTileRows * kTileN];
    Epilogue plain;
    plain.out_dtype = DType::i32;
    ProductI8 tile = p;
    tile.epilogue = &plain;
    tile.out = reinterpret_cast<char *>(acc);
    tile.row_bytes = kTileN * 4;
    for (int t0 = 0; t0 < p.count; t0 += kTileRows) {
        const void *first = static_cast<const char *>(p.rows[0]) + t0 * p.row_step;
        tile.rows = p.even() ? &first : p.rows + t0;
        tile.count = std::min(kTileRows, p.count - t0);
        if (p.raw) {
            tile.raw = p.raw + t0 * p.row_step;
            tile.operands = p.operands + t0 * p.row_step;
        }
        isa.product_i8(tile);
        tile.next_bytes = 0; // all of it beside the first
        store_tile(isa, out, acc, kTileN, false, m0 + t0, tile.count, n0, p.cols,
                   p.row_scale ? p.row_scale + t0 : nullptr);
    }
}

// Panels [p0, p1) of one group. Bytes of the pack before `skipped` weights of each output are left out.
void fused_panels(const Isa &isa, const uint8_t *packed, int64_t group, ProductI8 task, int64_t skipped,
                  int64_t p0, int64_t p1, const Output &out, int64_t m0, const Ahead &ahead) {
    const PackHeader &h = header_of(packed);
    task.panels = 1;
    const char *const raw =
        isa.signed_rows && direct_output(out) ? task.raw : nullptr; // of all but the first
    if (task.even() && h.taps == 1 && skipped == 0 && task.kq == div_up(h.k, h.kr) && !task.out_row &&
        row_by_row(out, h.k)) {
        const int64_t whole = std::min(p1, h.n / h.nr), most = panels_at_once(packed, group);
        for (; p0 < whole; p0 += task.panels) {
            task.panels = std::min(most, whole - p0);
            task.panel = task.next = reinterpret_cast<const int8_t *>(panel_data(packed, group, p0));
            task.width = task.cols = h.nr;
            fused_panel(isa, task, out, m0, group * h.n + p0 * h.nr);
            task.raw = raw;
        }
        task.panels = 1;
    }
    for (int64_t p = p0; p < p1; ++p) {
        task.width = panel_width(h, p);
        task.cols = static_cast<int>(std::min<int64_t>(task.width, h.n - p * h.nr));
        task.panel = reinterpret_cast<const int8_t *>(panel_data(packed, group, p) + skipped * task.width);
        task.gap = task.taps == 1 ? 0 : (div_up(h.k, h.kr) - task.kq) * h.kr * task.width;
        const Ahead next = p + 1 < p1 ? next_panel(packed, group, p) : ahead;
        task.next = next.at ? static_cast<const int8_t *>(next.at) : task.panel;
        task.next_bytes = next.bytes;
        fused_panel(isa, task, out, m0, group * h.n + p * h.nr);
        task.raw = raw;
    }
}

// Float rows that lie at one distance from each other.
void float_rows(const Isa &isa, const PackHeader &h, const uint8_t *panels, int64_t count, const Output &out,
                const void *x, int64_t step, int rows, int64_t m0, int64_t n0) {
    RowsF32 r;
    r.x = static_cast<const char *>(x);
    r.x_step = step;
    r.rows = rows;
    r.k = h.k;
    r.panels = reinterpret_cast<const float *>(panels);
    r.count = count;
    r.epilogue = &out.epilogue;
    r.n0 = n0;
    r.row_bytes = 4 * out.row_stride;
    r.out = static_cast<char *>(out.data) + m0 * r.row_bytes + 4 * n0;
    isa.rows_f32(r);
}

// Float operands: a tile of rows goes over the inputs in blocks, each of which stays in cache while all rows
// of the tile take it.
void float_tile(const Isa &isa, const PackHeader &h, const uint8_t *panel, int width,
                const void *const *pointers, int64_t ld, int rows, int64_t taps, int64_t per_tap,
                float *acc) {
    constexpr int64_t kInputs = 256, kMostKr = 16, kMostWidened = 16;
    const bool bytes = h.kind == PackKind::dense_w8, widen = bytes && isa.widen;
    alignas(64) float wide[(kInputs + kMostKr) * kMostWidened];
    const int most = isa.mr(width), parts = (rows + most - 1) / most;
    const int64_t all = std::max<int64_t>(1, per_tap); // a product of no inputs is zero
    const int64_t inputs = round_up(div_up(all, div_up(all, kInputs)), h.kr),
                  taps_at_once = std::max<int64_t>(1, kInputs / all), padded = round_up(per_tap, h.kr);
    for (int64_t t = 0; t < taps; t += taps_at_once)
        for (int64_t k = 0; k < all; k += inputs) {
            const uint8_t *data = panel + (t * padded + k) * width * (bytes ? 1 : 4);
            const int64_t some_taps = std::min(taps_at_once, taps - t), some = std::min(inputs, per_tap - k);
            if (widen) {
                for (int64_t i = 0; i < some_taps; ++i)
                    isa.widen(reinterpret_cast<const int8_t *>(data) + i * padded * width, div_up(some, h.kr),
                              width, wide + i * some * width);
                data = reinterpret_cast<const uint8_t *>(wide);
            }
            for (int i = 0; i < parts; ++i) {
                const int r0 = rows * i / parts, mr = rows * (i + 1) / parts - r0;
                isa.dot_f32(pointers + t * ld + r0, ld, mr, k, some_taps, some, data, bytes && !widen, width,
                            t + k > 0, acc + r0 * kTileN);
            }
        }
}

} // namespace

void gemm_block(const Isa &isa, const uint8_t *packed, int64_t group, const void *const *pointers, int64_t ld,
                int rows, int64_t p0, int64_t p1, const Output &out, int64_t m0, const float *row_scale) {
    const PackHeader &h = header_of(packed);
    gemm_block_taps(isa, packed, group, pointers, ld, rows, {0, h.taps, 0, h.k}, p0, p1, out, m0, row_scale,
                    nullptr, {});
}

void gemm_block_taps(const Isa &isa, const uint8_t *packed, int64_t group, const void *const *pointers,
                     int64_t ld, int rows, const Taps &part, int64_t p0, int64_t p1, const Output &out,
                     int64_t m0, const float *row_scale, const int32_t *out_row, const Ahead &ahead) {
    const PackHeader &h = header_of(packed);
    const int64_t taps = part.tap1 - part.tap0, k = part.k1 - part.k0, kq = div_up(k, h.kr);
    const int64_t skipped =
        (part.tap0 * round_up(h.k, h.kr) + part.k0) * (h.kind == PackKind::dense_f32 ? 4 : 1);
    if (isa.product_i8 && h.kind == PackKind::dense_i8) {
        ProductI8 task = {};
        task.rows = pointers;
        task.ld = ld;
        task.row_step = taps == 1 ? row_step(pointers, rows) : 0;
        task.count = rows;
        task.taps = taps;
        task.kq = kq;
        task.row_scale = row_scale;
        task.out_row = out_row;
        const void *first;
        if (isa.even_rows && rows >= kLeastTileRows && !task.even() && kq == div_up(h.k, h.kr)) {
            const int64_t bytes = kq * h.kr, step = round_up(taps * bytes, 64) | 64; // of all sets of L1
            char *const at = static_cast<char *>(scratch(Scratch::even, static_cast<size_t>(rows * step)));
            isa.even_rows(pointers, ld, rows, taps, bytes, at, step);
            first = at;
            task.rows = &first;
            task.row_step = step;
            task.taps = 1;
            task.kq = taps * kq;
        }
        return fused_panels(isa, packed, group, task, skipped, p0, p1, out, m0, ahead);
    }
    if (h.kind == PackKind::dense_f32 && !row_scale && !out.epilogue.w_scale && taps == 1 && h.taps == 1 &&
        k == h.k && row_by_row(out, k)) {
        const int64_t step = row_step(pointers, rows);
        if (rows == 1 || step != 0) {
            const int64_t whole = std::min(p1, h.n / h.nr), most = panels_at_once(packed, group);
            while (p0 < whole) {
                const int64_t count = std::min(most, whole - p0);
                float_rows(isa, h, panel_data(packed, group, p0), count, out, pointers[0], step, rows, m0,
                           group * h.n + p0 * h.nr);
                p0 += count;
            }
        }
    }
    alignas(64) int32_t acc[kTileRows * kTileN];
    for (int64_t p = p0; p < p1; ++p) {
        const int width = panel_width(h, p);
        const int cols = static_cast<int>(std::min<int64_t>(width, h.n - p * h.nr));
        const uint8_t *data = panel_data(packed, group, p) + skipped * width;
        for (int t0 = 0; t0 < rows; t0 += kTileRows) {
            const int tile = std::min(kTileRows, rows - t0);
            if (h.kind != PackKind::dense_i8) {
                float_tile(isa, h, data, width, pointers + t0, ld, tile, taps, k,
                           reinterpret_cast<float *>(acc));
            } else {
                // Rows are dealt out evenly: two tiles of 4 run faster than one of 6 and one of 2.
                const int most = isa.mr(width), parts = (tile + most - 1) / most;
                for (int i = 0; i < parts; ++i) {
                    const int r0 = tile * i / parts, mr = tile * (i + 1) / parts - r0;
                    isa.dot_i8(pointers + t0 + r0, ld, mr, taps, kq, reinterpret_cast<const int8_t *>(data),
                               width, acc + r0 * kTileN);
                }
            }
            store_tile(isa, out, acc, kTileN, false, m0 + t0, tile, group * h.n + p * h.nr, cols,
                       row_scale ? row_scale + t0 : nullptr);
        }
    }
}

void gemm_stored(const Isa &isa, const uint8_t *packed, const char *x, char *operands, int rows, int64_t p0,
                 int64_t p1, const Output &out, int64_t m0, const float *row_scale, const Ahead &ahead) {
    const PackHeader &h = header_of(packed);
    const void *const first = operands;
    ProductI8 task = {};
    task.rows = &first;
    task.row_step = h.k;
    task.count = rows;
    task.taps = 1;
    task.kq = h.k / h.kr;
    task.row_scale = row_scale;
    task.raw = x;
    task.operands = operands;
    fused_panels(isa, packed, 0, task, 0, p0, p1, out, m0, ahead);
}

int64_t threads_for(int64_t macs, int64_t weight_bytes) {
    // A fork-join costs 0.7 us on an idle machine and a time slice on a busy one: below about 4 us of work
    // (230 multiply-accumulates on Zen 4, 500 on Zen 5, or 100 bytes of weight a nanosecond) one thread is as
    // good.
    return macs < 1'000'000 && weight_bytes < 384 * 1024 ? 1 : max_threads();
}

Split split_gemm(int64_t m, int64_t n_panels, int64_t macs, int64_t weight_bytes) {
    Split s;
    const int64_t threads = threads_for(macs, weight_bytes);
    s.tm = std::max<int64_t>(1, std::min(threads, m / 24));
    s.tn = std::max<int64_t>(1, std::min(threads / s.tm, n_panels));
    return s;
}

} // namespace tautorch
