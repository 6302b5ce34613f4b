#include "kernels/common/source.h"

#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

namespace tautorch {
namespace {

// Threads for a pass over `elements` elements: about 8 a nanosecond, against 0.7 us for a fork-join.
int64_t pass_tasks(int64_t elements, int64_t most) {
    return elements < 65'536 ? 1 : std::max<int64_t>(1, std::min(max_threads(), most));
}

// An odd number of cache lines: at a multiple of 4 KB all rows of a tile would share one set of L1.
int64_t spread_stride(int64_t bytes) { return round_up(bytes, 64) | 64; }

struct SampleQuant {
    float inv;
    int32_t zp, lo, hi;
    bool blank; // write zero_point only
};

// Scale of every sample (written to `scales`) and how to quantise it. Whether a sample is finite shows here
// for dynamic scales, and with fixed ones when it is quantised: one pass over it instead of two.
void sample_scales(const Isa &isa, const ActQuant &q, const char *x, int64_t batch, int64_t n, float *scales,
                   SampleQuant *how) {
    const auto one = [&](int64_t b) {
        SampleQuant s = {0.0f, q.zero_point, -128, 127, false};
        float scale = q.scale;
        if (q.mode == ActQuant::given) {
            scale = q.scale_of(b);
        } else if (q.mode == ActQuant::fixed) {
            s.inv = 1.0f / scale;
        } else {
            bool finite = true;
            const float amax = isa.amax(x + b * n * size_of(q.dtype), q.dtype, n, &finite);
            s.zp = 0;
            s.lo = -127;
            scale = amax >= kTiny ? amax / 127.0f : 1.0f;
            s.inv = amax >= kTiny ? 127.0f / amax : 0.0f;
            s.blank = !finite || s.inv == 0.0f;
            if (!finite)
                scale = std::numeric_limits<float>::quiet_NaN();
        }
        scales[b] = scale;
        how[b] = s;
    };
    const int64_t tasks = q.mode == ActQuant::dynamic ? pass_tasks(batch * n, batch) : 1;
    parallel_tasks(tasks, [&](int64_t t) {
        for (int64_t b = chunk_begin(batch, tasks, t); b < chunk_begin(batch, tasks, t + 1); ++b)
            one(b);
    });
}

// n elements -> operands. False if they had to be finite and are not.
bool convert(const Isa &isa, OperandKind kind, DType dtype, const SampleQuant &s, const void *x, int64_t n,
             void *out) {
    if (kind == OperandKind::f32)
        isa.to_f32(x, dtype, n, static_cast<float *>(out));
    else if (!s.blank)
        return isa.quantize(x, dtype, n, s.inv, s.zp, s.lo, s.hi, act_of(kind), out);
    else if (kind != OperandKind::s16)
        std::memset(out, s.zp + operand_shift(kind), static_cast<size_t>(n));
    else
        std::fill_n(static_cast<int16_t *>(out), n, static_cast<int16_t>(s.zp));
    return true;
}

// rows [n][ld_in] of elements -> out[j * ld_out + i], both strides in elements.
template <class T>
void transpose_plain(const T *in, int64_t rows, int64_t cols, int64_t ld_in, T *out, int64_t ld_out) {
    for (int64_t j = 0; j < cols; ++j)
        for (int64_t i = 0; i < rows; ++i)
            out[j * ld_out + i] = in[i * ld_in + j];
}

// [channels][kStrip] operands -> pixel-major.
constexpr int64_t kStrip = 64;
void turn(const Isa &isa, OperandKind kind, const char *in, int64_t channels, int64_t pixels, char *out,
          int64_t ld_bytes) {
    if (kind == OperandKind::s16) {
        transpose_plain(reinterpret_cast<const int16_t *>(in), channels, pixels, kStrip,
                        reinterpret_cast<int16_t *>(out), ld_bytes / 2);
        return;
    }
    const bool bytes = kind != OperandKind::f32;
    const int64_t step = bytes ? 16 : 4, size = bytes ? 1 : 4;
    int64_t c = 0;
    for (; c + step <= channels; c += step) {
        const void *rows[16];
        for (int64_t i = 0; i < step; ++i)
            rows[i] = in + (c + i) * kStrip * size;
        if (bytes)
            isa.transpose_u8(reinterpret_cast<const uint8_t *const *>(rows), 16, pixels,
                             reinterpret_cast<uint8_t *>(out) + c, ld_bytes);
        else
            isa.transpose_32(reinterpret_cast<const uint32_t *const *>(rows), 4, pixels,
                             reinterpret_cast<uint32_t *>(out) + c, ld_bytes / 4);
    }
    if (bytes)
        transpose_plain(in + c * kStrip, channels - c, pixels, kStrip, out + c, ld_bytes);
    else
        transpose_plain(reinterpret_cast<const uint32_t *>(in) + c * kStrip, channels - c, pixels, kStrip,
                        reinterpret_cast<uint32_t *>(out) + c, ld_bytes / 4);
}

} // namespace

void Source::fill(int64_t g, int64_t m0, int rows, const void **pointers, int64_t ld) const {
    if (image)
        fill_image(g, m0, rows, pointers, ld);
    else
        for (int r = 0; r < rows; ++r)
            pointers[r] = data + (m0 + r) * row_stride + g * group_stride;
    if (!last_rows || m0 + rows <= moved_from)
        return;
    for (int64_t t = 0; t < taps; ++t)
        for (int r = 0; r < rows; ++r) {
            const char *p = static_cast<const char *>(pointers[t * ld + r]);
            if (p >= last_rows && p < end)
                pointers[t * ld + r] = p + moved;
        }
}

void Source::fill_image(int64_t g, int64_t m0, int rows, const void **pointers, int64_t ld) const {
    const int64_t shift = g * group_stride;
    const Geometry &o = geometry;
    const int64_t right = o.dw * row_stride, below = o.dh * o.width * row_stride; // from a tap to the next
    int64_t b = m0 / out_pixels, oy = m0 % out_pixels / out_width, ox = m0 % out_pixels % out_width;
    for (int r = 0; r < rows; ++r) {
        const int64_t y0 = oy * o.sh - o.ph, x0 = ox * o.sw - o.pw;
        const char *sample = data + b * o.height * o.width * row_stride + shift;
        const void **to = pointers + r;
        if (y0 >= 0 && x0 >= 0 && y0 + o.dh * (o.kh - 1) < o.height && x0 + o.dw * (o.kw - 1) < o.width) {
            const char *line = sample + (y0 * o.width + x0) * row_stride;
            for (int64_t i = 0; i < o.kh; ++i, line += below)
                for (int64_t j = 0; j < o.kw; ++j, to += ld)
                    *to = line + j * right;
        } else {
            for (int64_t i = 0, y = y0; i < o.kh; ++i, y += o.dh) {
                const bool inside = y >= 0 && y < o.height;
                for (int64_t j = 0, x = x0; j < o.kw; ++j, x += o.dw, to += ld)
                    *to = inside && x >= 0 && x < o.width ? sample + (y * o.width + x) * row_stride
                                                          : padding + shift;
            }
        }
        if (++ox == out_width) {
            ox = 0;
            if (++oy * out_width == out_pixels) {
                oy = 0;
                ++b;
            }
        }
    }
}

bool Source::row_scales(int64_t m0, int rows, float *scale) const {
    if (!scales)
        return false;
    // By runs: a division for each row takes longer than a narrow row's products.
    for (int64_t i = m0 / rows_per_scale, r = 0; r < rows; ++i) {
        const int64_t next = std::min<int64_t>(rows, (i + 1) * rows_per_scale - m0);
        std::fill(scale + r, scale + next, scales[i]);
        r = next;
    }
    return true;
}

Source matrix_source(const Isa &isa, const ActQuant &q, OperandKind kind, const void *x, int64_t stride,
                     int64_t m, int64_t k, int64_t kr) {
    Source s;
    s.m = m;
    const char *from = static_cast<const char *>(x);
    if (kind == OperandKind::f32 && q.dtype == DType::f32) {
        s.data = from;
        s.row_stride = 4 * stride;
        return s;
    }
    const int64_t padded = round_up(k, kr);
    s.row_stride = spread_stride(padded * operand_bytes(kind));
    uint8_t *out = static_cast<uint8_t *>(scratch(Scratch::rows, static_cast<size_t>(m * s.row_stride + 64)));
    s.data = reinterpret_cast<const char *>(out);
    float *scale = nullptr;
    if (kind != OperandKind::f32) {
        scale = static_cast<float *>(scratch(Scratch::scales, static_cast<size_t>(4 * m)));
        s.scales = scale;
    }
    const int64_t tasks = pass_tasks(m * k, m);
    parallel_tasks(tasks, [&](int64_t t) {
        const int64_t m0 = chunk_begin(m, tasks, t), m1 = chunk_begin(m, tasks, t + 1);
        if (scale) {
            quantize_rows(isa, q, act_of(kind), x, stride, m0, m1 - m0, k, padded, out + m0 * s.row_stride,
                          s.row_stride, scale + m0);
            return;
        }
        for (int64_t r = m0; r < m1; ++r)
            isa.to_f32(from + r * stride * size_of(q.dtype), q.dtype, k,
                       reinterpret_cast<float *>(out + r * s.row_stride));
    });
    return s;
}

Source block_source(const Isa &isa, const ActQuant &q, OperandKind kind, const void *x, int64_t stride,
                    int64_t m0, int64_t rows, int64_t k, int64_t kr, Scratch operands, Scratch scales) {
    Source s;
    s.m = rows;
    const char *from = static_cast<const char *>(x);
    if (kind == OperandKind::f32 && q.dtype == DType::f32) {
        s.data = from + 4 * m0 * stride;
        s.row_stride = 4 * stride;
        return s;
    }
    const int64_t padded = round_up(k, kr);
    s.row_stride = spread_stride(padded * operand_bytes(kind));
    uint8_t *out = static_cast<uint8_t *>(scratch(operands, static_cast<size_t>(rows * s.row_stride + 64)));
    s.data = reinterpret_cast<const char *>(out);
    if (kind != OperandKind::f32) {
        float *scale = static_cast<float *>(scratch(scales, static_cast<size_t>(4 * rows)));
        s.scales = scale;
        quantize_rows(isa, q, act_of(kind), x, stride, m0, rows, k, padded, out, s.row_stride, scale);
        return s;
    }
    for (int64_t r = 0; r < rows; ++r)
        isa.to_f32(from + (m0 + r) * stride * size_of(q.dtype), q.dtype, k,
                   reinterpret_cast<float *>(out + r * s.row_stride));
    return s;
}

Source image_source(const Isa &isa, const ActQuant &q, OperandKind kind, const void *x, bool channels_last,
                    const Geometry &g, int64_t groups, int64_t kr) {
    Source s;
    s.image = true;
    s.geometry = g;
    s.out_width = g.out_width();
    s.out_pixels = g.out_pixels();
    s.m = g.batch * s.out_pixels;
    s.taps = g.kh * g.kw;
    const int64_t size = operand_bytes(kind), per_group = g.channels / groups;
    const int64_t padded = round_up(per_group, kr), pixels = g.height * g.width;
    s.group_stride = padded * size;
    s.row_stride = groups * s.group_stride;
    s.rows_per_scale = s.out_pixels;
    if (kind == OperandKind::f32 && q.dtype == DType::f32 && channels_last) { // as it is
        s.data = static_cast<const char *>(x);
        s.padding =
            static_cast<char *>(std::memset(scratch(Scratch::image, static_cast<size_t>(s.row_stride)), 0,
                                            static_cast<size_t>(s.row_stride)));
        return s;
    }
    const int64_t bytes = g.batch * pixels * s.row_stride;
    char *image =
        static_cast<char *>(scratch(Scratch::image, static_cast<size_t>(bytes + s.row_stride + 64)));
    s.data = image;
    char *padding = image + bytes;
    s.padding = padding;

    const char *from = static_cast<const char *>(x);
    const int64_t in_size = size_of(q.dtype), sample = g.channels * pixels;
    SampleQuant *how = static_cast<SampleQuant *>(
        scratch(Scratch::pointers, sizeof(SampleQuant) * static_cast<size_t>(g.batch)));
    float *scales = nullptr;
    if (kind != OperandKind::f32) {
        scales = static_cast<float *>(scratch(Scratch::scales, static_cast<size_t>(4 * g.batch)));
        sample_scales(isa, q, from, g.batch, sample, scales, how);
        s.scales = scales;
    }
    const SampleQuant blank = {0.0f, q.mode == ActQuant::dynamic ? 0 : q.zero_point, 0, 0, true};
    if (kind == OperandKind::f32)
        std::memset(padding, 0, static_cast<size_t>(s.row_stride));
    else
        convert(isa, kind, q.dtype, blank, nullptr, s.row_stride / size, padding);

    const bool whole = padded == per_group; // no holes between groups: channels of a pixel are adjacent
    const int64_t strips = div_up(pixels, kStrip);
    const int64_t tasks = pass_tasks(g.batch * sample, g.batch * strips);
    std::atomic<bool> all_finite = true;
    parallel_tasks(tasks, [&](int64_t t) {
        bool finite = true;
        char *strip = static_cast<char *>(
            channels_last ? nullptr
                          : scratch(Scratch::tile, static_cast<size_t>(g.channels * kStrip * size)));
        for (int64_t i = chunk_begin(g.batch * strips, tasks, t);
             i < chunk_begin(g.batch * strips, tasks, t + 1); ++i) {
            const int64_t b = i / strips, p0 = i % strips * kStrip, n = std::min(kStrip, pixels - p0);
            char *out = image + (b * pixels + p0) * s.row_stride;
            const char *in = from + b * sample * in_size;
            const SampleQuant &sq = kind == OperandKind::f32 ? blank : how[b];
            if (!whole) // the weights there are zero; the value only has to be defined
                std::memset(out, 0, static_cast<size_t>(n * s.row_stride));
            if (channels_last && whole) {
                finite &=
                    convert(isa, kind, q.dtype, sq, in + p0 * g.channels * in_size, n * g.channels, out);
            } else if (channels_last) {
                for (int64_t p = 0; p < n; ++p)
                    for (int64_t j = 0; j < groups; ++j)
                        finite &= convert(isa, kind, q.dtype, sq,
                                          in + ((p0 + p) * g.channels + j * per_group) * in_size, per_group,
                                          out + p * s.row_stride + j * s.group_stride);
            } else {
                for (int64_t c = 0; c < g.channels; ++c)
                    finite &= convert(isa, kind, q.dtype, sq, in + (c * pixels + p0) * in_size, n,
                                      strip + c * kStrip * size);
                if (whole)
                    turn(isa, kind, strip, g.channels, n, out, s.row_stride);
                else
                    for (int64_t j = 0; j < groups; ++j)
                        turn(isa, kind, strip + j * per_group * kStrip * size, per_group, n,
                             out + j * s.group_stride, s.row_stride);
            }
        }
        if (!finite)
            all_finite.store(false, std::memory_order_relaxed);
    });
    if (q.mode == ActQuant::fixed && kind != OperandKind::f32 && !all_finite)
        for (int64_t b = 0; b < g.batch; ++b) { // rare: look which samples it was
            bool finite = true;
            isa.amax(from + b * sample * in_size, q.dtype, sample, &finite);
            if (finite)
                continue;
            scales[b] = std::numeric_limits<float>::quiet_NaN();
            convert(isa, kind, q.dtype, blank, nullptr, pixels * s.row_stride / size,
                    image + b * pixels * s.row_stride);
        }
    return s;
}

Source image_in_place(const ActQuant &q, OperandKind kind, const void *x, const Geometry &g, int64_t groups) {
    Source s;
    s.geometry = g;
    s.out_width = g.out_width();
    s.out_pixels = g.out_pixels();
    s.m = g.batch * s.out_pixels;
    s.taps = g.kh * g.kw;
    s.group_stride = g.channels / groups;
    s.row_stride = g.channels;
    s.flip = static_cast<uint8_t>(operand_shift(kind));
    // Pixels that follow each other as they are: rows of a matrix.
    s.image = s.taps > 1 || g.sh > 1 || g.sw > 1 || g.ph > 0 || g.pw > 0;
    s.data = static_cast<const char *>(x);
    constexpr int64_t kBeyond = 64; // bytes that are read past a row
    const int64_t pixels = g.batch * g.height * g.width;
    const int64_t last = std::min(pixels, div_up(kBeyond, g.channels));
    char *copy = static_cast<char *>(
        scratch(Scratch::image, static_cast<size_t>((last + 1) * g.channels + 2 * kBeyond)));
    s.end = s.data + pixels * g.channels;
    s.last_rows = s.end - last * g.channels;
    s.moved = copy - s.last_rows;
    const int64_t sample = g.height * g.width;
    s.moved_from = s.image ? (pixels - last) / sample * s.out_pixels : pixels - last;
    std::memcpy(copy, s.last_rows, static_cast<size_t>(last * g.channels));
    char *padding = copy + last * g.channels + kBeyond;
    s.padding = padding;
    std::memset(padding, q.zero_point, static_cast<size_t>(g.channels + kBeyond));
    float *scales = static_cast<float *>(scratch(Scratch::scales, static_cast<size_t>(4 * g.batch)));
    for (int64_t b = 0; b < g.batch; ++b)
        scales[b] = q.scale_of(b);
    s.scales = scales;
    s.rows_per_scale = s.out_pixels;
    return s;
}

Output image_output(const Epilogue &e, void *data, bool channels_last, const Geometry &g, int64_t outputs) {
    Output o;
    o.epilogue = e;
    o.data = data;
    o.along_m = !channels_last;
    o.row_stride = outputs;
    o.plane_stride = g.out_pixels();
    o.rows_per_sample = g.out_pixels();
    o.sample_stride = outputs * g.out_pixels();
    return o;
}

Epilogue with_correction(Epilogue e, const uint8_t *packed, OperandKind kind, const ActQuant &q) {
    e.acc_float = kind == OperandKind::f32;
    if (!e.acc_float) {
        e.colsum = reinterpret_cast<const int32_t *>(packed + header_of(packed).colsum_off);
        e.correction = -(operand_shift(kind) + (q.mode == ActQuant::dynamic ? 0 : q.zero_point));
    }
    return e;
}

} // namespace tautorch
