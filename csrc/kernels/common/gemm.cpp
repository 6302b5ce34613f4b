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
    constexpr float kTiny = 0x1p-100f; // below, a row counts as zero: 127 / amax would overflow
    const int64_t width = act_bytes(act);
    const char *base = static_cast<const char *>(x);
    for (int64_t r = 0; r < rows; ++r, out += out_stride) {
        const void *row = base + (m0 + r) * stride * size_of(q.dtype);
        float scale = 1.0f, inv = 0.0f;
        int32_t zp = q.zero_point, lo = -128, hi = 127;
        bool finite = true;
        if (q.mode == ActQuant::given) {
            scale = q.given_scale[q.given_scales == 1 ? 0 : m0 + r];
        } else if (q.mode == ActQuant::fixed) {
            isa.amax(row, q.dtype, n, &finite);
            scale = q.scale;
            inv = 1.0f / scale;
        } else {
            const float amax = isa.amax(row, q.dtype, n, &finite);
            zp = 0;
            lo = -127;
            if (amax >= kTiny) {
                scale = amax / 127.0f;
                inv = 127.0f / amax;
            }
        }
        if (finite && (inv != 0.0f || q.mode == ActQuant::given)) {
            isa.quantize(row, q.dtype, n, inv, zp, lo, hi, act, out);
        } else {
            if (!finite)
                scale = std::numeric_limits<float>::quiet_NaN();
            if (act == ActKind::u8_shifted)
                std::memset(out, zp + 128, static_cast<size_t>(n));
            else
                std::fill_n(reinterpret_cast<int16_t *>(out), n, static_cast<int16_t>(zp));
        }
        if (n_padded > n) // the weights there are zero; the value only has to be defined
            std::memset(out + n * width, 0, static_cast<size_t>((n_padded - n) * width));
        row_scale[r] = scale;
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

// Whether accumulators leave from their registers, without a tile in memory.
static bool goes_direct(const Isa &isa, PackKind kind, const Output &out) {
    const Epilogue &e = out.epilogue;
    return isa.product_i8 && kind == PackKind::dense_i8 && !out.along_m &&
           (e.activation == Activation::none || e.activation == Activation::relu) &&
           (e.out_dtype == DType::f32 || e.out_dtype == DType::bf16 || e.out_dtype == DType::f16);
}

void gemm_block(const Isa &isa, const uint8_t *packed, int64_t group, const void *const *pointers, int64_t ld,
                int rows, int64_t p0, int64_t p1, const Output &out, int64_t m0, const float *row_scale) {
    const PackHeader &h = header_of(packed);
    alignas(64) int32_t acc[kTileRows * kTileN];
    const int64_t kq = div_up(h.k, h.kr);
    const bool direct = goes_direct(isa, h.kind, out);
    for (int64_t p = p0; p < p1; ++p) {
        const int width = panel_width(h, p);
        const int cols = static_cast<int>(std::min<int64_t>(width, h.n - p * h.nr));
        const uint8_t *data = panel_data(packed, group, p);
        const int64_t n0 = group * h.n + p * h.nr;
        if (direct) {
            const Epilogue &e = out.epilogue;
            isa.product_i8(e, pointers, ld, rows, h.taps, kq, reinterpret_cast<const int8_t *>(data), width,
                           n0, cols, row_scale,
                           static_cast<char *>(out.data) + (m0 * out.row_stride + n0) * size_of(e.out_dtype),
                           out.row_stride);
            continue;
        }
        const int most = isa.mr(width);
        for (int t0 = 0; t0 < rows; t0 += kTileRows) {
            const int tile = std::min(kTileRows, rows - t0);
            // Rows are dealt out evenly: two tiles of 4 run faster than one of 6 and one of 2.
            const int parts = (tile + most - 1) / most;
            for (int i = 0; i < parts; ++i) {
                const int r0 = tile * i / parts, mr = tile * (i + 1) / parts - r0;
                const void *const *at = pointers + t0 + r0;
                if (h.kind == PackKind::dense_i8)
                    isa.dot_i8(at, ld, mr, h.taps, kq, reinterpret_cast<const int8_t *>(data), width,
                               acc + r0 * kTileN);
                else
                    isa.dot_f32(at, ld, mr, h.taps, h.k, data, h.kind == PackKind::dense_w8, width,
                                reinterpret_cast<float *>(acc) + r0 * kTileN);
            }
            store_tile(isa, out, acc, kTileN, false, m0 + t0, tile, n0, cols,
                       row_scale ? row_scale + t0 : nullptr);
        }
    }
}

Split split_gemm(int64_t m, int64_t n_panels, int64_t macs, int64_t weight_bytes) {
    // A fork-join costs 0.7 us on an idle machine and a time slice on a busy one: below about 4 us of work
    // (500 multiply-accumulates or 100 bytes of weight a nanosecond) one thread is as good.
    Split s;
    const int64_t threads = macs < 2'000'000 && weight_bytes < 384 * 1024 ? 1 : max_threads();
    s.tm = std::max<int64_t>(1, std::min(threads, m / 24));
    s.tn = std::max<int64_t>(1, std::min(threads / s.tm, n_panels));
    return s;
}

} // namespace tautorch
