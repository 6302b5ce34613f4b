#include "kernels/common/source.h"

#include "core/parallel.h"
#include "kernels/common/planes.h"

#include <algorithm>
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
        const char *sample = data + shift;
        const int64_t from = b * o.height * o.width - first;
        const void **to = pointers + r;
        if (y0 >= 0 && x0 >= 0 && y0 + o.dh * (o.kh - 1) < o.height && x0 + o.dw * (o.kw - 1) < o.width) {
            const char *line = sample + (from + y0 * o.width + x0) * row_stride;
            for (int64_t i = 0; i < o.kh; ++i, line += below)
                for (int64_t j = 0; j < o.kw; ++j, to += ld)
                    *to = line + j * right;
        } else {
            for (int64_t i = 0, y = y0; i < o.kh; ++i, y += o.dh) {
                const bool inside = y >= 0 && y < o.height;
                for (int64_t j = 0, x = x0; j < o.kw; ++j, x += o.dw, to += ld)
                    *to = inside && x >= 0 && x < o.width ? sample + (from + y * o.width + x) * row_stride
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

SampleQuant quant_of(const ActQuant &q, int64_t b) {
    SampleQuant s;
    s.zp = q.zero_point;
    if (q.mode == ActQuant::given)
        s.scale = q.scale_of(b);
    else if (q.mode == ActQuant::fixed)
        s.scale = q.scale, s.inv = 1.0f / q.scale;
    return s;
}

void dynamic_quant(const Isa &isa, const ActQuant &q, const char *x, int64_t batch, int64_t n,
                   SampleQuant *how) {
    constexpr int64_t kPart = 32'768;
    const int64_t parts = std::max<int64_t>(1, std::min(max_threads(), n / kPart));
    struct Part {
        float amax;
        bool finite;
    };
    Part *part =
        static_cast<Part *>(scratch(Scratch::pointers, sizeof(Part) * static_cast<size_t>(batch * parts)));
    const int64_t total = batch * parts;
    const int64_t tasks = batch * n < 2 * kPart ? 1 : std::min(max_threads(), total);
    parallel_tasks(tasks, [&](int64_t t) {
        for (int64_t i = chunk_begin(total, tasks, t); i < chunk_begin(total, tasks, t + 1); ++i) {
            const int64_t b = i / parts, from = chunk_begin(n, parts, i % parts),
                          to = chunk_begin(n, parts, i % parts + 1);
            part[i].finite = true;
            part[i].amax =
                isa.amax(x + (b * n + from) * size_of(q.dtype), q.dtype, to - from, &part[i].finite);
        }
    });
    for (int64_t b = 0; b < batch; ++b) {
        float amax = 0.0f;
        bool finite = true;
        for (int64_t i = b * parts; i < (b + 1) * parts; ++i) {
            finite = finite && part[i].finite;
            amax = std::max(amax, part[i].amax);
        }
        SampleQuant &s = how[b];
        s = {};
        s.lo = -127;
        if (finite && amax >= kTiny) {
            s.scale = amax / 127.0f;
            s.inv = 127.0f / amax;
        }
        s.blank = !finite || s.inv == 0.0f;
        if (!finite)
            s.scale = std::numeric_limits<float>::quiet_NaN();
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

ImagePixels::ImagePixels(const Isa &isa, const ActQuant &q, OperandKind kind, const void *x,
                         bool channels_last, const Geometry &g, int64_t groups, int64_t kr)
    : isa_(isa), q_(q), kind_(kind), x_(static_cast<const char *>(x)), channels_last_(channels_last), g_(g),
      groups_(groups), per_group_(g.channels / groups), size_(operand_bytes(kind)),
      pixels_(g.height * g.width) {
    Source &s = source_;
    s.image = true;
    s.geometry = g;
    s.out_width = g.out_width();
    s.out_pixels = g.out_pixels();
    s.m = g.batch * s.out_pixels;
    s.taps = g.kh * g.kw;
    s.group_stride = round_up(per_group_, kr) * size_;
    s.row_stride = groups * s.group_stride;
    s.rows_per_scale = s.out_pixels;
    if (kind == OperandKind::f32)
        return;
    const auto batch = static_cast<size_t>(g.batch);
    char *memory =
        static_cast<char *>(scratch(Scratch::scales, batch * (sizeof(SampleQuant) + sizeof(float))));
    how_ = reinterpret_cast<SampleQuant *>(memory);
    float *scales = reinterpret_cast<float *>(memory + batch * sizeof(SampleQuant));
    if (q.mode == ActQuant::dynamic)
        dynamic_quant(isa, q, x_, g.batch, g.channels * pixels_, how_);
    for (int64_t b = 0; b < g.batch; ++b) {
        if (q.mode != ActQuant::dynamic)
            how_[b] = quant_of(q, b);
        scales[b] = how_[b].scale;
    }
    s.scales = scales;
}

Source ImagePixels::later() const {
    Source s = source_;
    s.pixels = this;
    return s;
}

int64_t ImagePixels::together(int64_t unit, int64_t threads) const {
    constexpr int64_t kBytes = 192 * 1024; // of a band, so that it stays in the second-level cache
    const int64_t m = div_up(source_.m, threads), share = round_up(m, unit);
    const int64_t few = kBytes / std::max<int64_t>(1, source_.row_stride * g_.sh * g_.sw) / unit * unit;
    // Wide images under few output rows, or under dilated filters, would be read many times over: 12 to 54
    // times was 4 to 22 times as slow as one copy for all, 1.3 times as fast or slow.
    for (const int64_t band : {std::clamp(few, unit, share), share}) {
        const int64_t rows = (div_up(std::min(band, m), source_.out_width) + 1) * g_.sh + g_.dh * (g_.kh - 1);
        const int64_t bands = threads * div_up(m, band);
        if (10 * bands * std::min(rows, g_.batch * g_.height) <= 13 * g_.batch * g_.height)
            return band;
    }
    return 0;
}

// What lies outside the image.
void ImagePixels::pad(char *out) const {
    const SampleQuant blank = {0.0f, 1.0f, q_.mode == ActQuant::dynamic ? 0 : q_.zero_point, 0, 0, true};
    if (kind_ == OperandKind::f32)
        std::memset(out, 0, static_cast<size_t>(source_.row_stride));
    else
        to_operands(isa_, kind_, q_.dtype, blank, nullptr, source_.row_stride / size_, out);
}

// Pixels [from, to) of all samples'.
void ImagePixels::convert(int64_t from, int64_t to, char *out) const {
    const int64_t in_size = size_of(q_.dtype), stride = source_.row_stride, group = source_.group_stride;
    const bool whole =
        per_group_ * size_ == group; // no holes between groups: channels of a pixel are adjacent
    bool finite = true;
    for (int64_t at = from, n; at < to; at += n, out += n * stride) {
        const int64_t b = at / pixels_, p0 = at % pixels_;
        n = std::min(pixels_ - p0, to - at);
        const char *in = x_ + b * g_.channels * pixels_ * in_size;
        const SampleQuant sq = how_ ? how_[b] : SampleQuant{};
        const auto operands = [&](int64_t element, int64_t count, char *to) {
            finite &= to_operands(isa_, kind_, q_.dtype, sq, in + element * in_size, count, to);
        };
        if (!whole) // the weights there are zero; the value only has to be defined
            std::memset(out, 0, static_cast<size_t>(n * stride));
        if (channels_last_ && whole) {
            operands(p0 * g_.channels, n * g_.channels, out);
        } else if (channels_last_) {
            for (int64_t p = 0; p < n; ++p)
                for (int64_t j = 0; j < groups_; ++j)
                    operands((p0 + p) * g_.channels + j * per_group_, per_group_,
                             out + p * stride + j * group);
        } else {
            const int64_t channels = whole ? g_.channels : per_group_;
            for (int64_t j = 0; j < (whole ? 1 : groups_); ++j)
                finite &= planes_to_operands(isa_, kind_, q_.dtype, sq,
                                             in + (j * per_group_ * pixels_ + p0) * in_size,
                                             pixels_ * in_size, channels, n, out + j * group, stride);
        }
    }
    if (!finite)
        finite_.store(false, std::memory_order_relaxed);
}

Source ImagePixels::ready(int64_t m0, int64_t m1) const {
    // First input row under an output pixel, from its sample's first; every row is somebody's.
    const auto top = [&](int64_t m) {
        return std::clamp<int64_t>(m % source_.out_pixels / source_.out_width * g_.sh - g_.ph, 0, g_.height);
    };
    const int64_t first_sample = m0 / source_.out_pixels, last_sample = (m1 - 1) / source_.out_pixels;
    const int64_t from = first_sample * pixels_ + (m0 % source_.out_pixels ? top(m0) * g_.width : int64_t{0});
    const int64_t under =
        (m1 - 1) % source_.out_pixels / source_.out_width * g_.sh - g_.ph + g_.dh * (g_.kh - 1) + 1;
    const int64_t end = m1 % source_.out_pixels == 0
                            ? g_.height
                            : std::clamp<int64_t>(std::max(under, top(m1)), 0, g_.height);
    const int64_t to = last_sample * pixels_ + end * g_.width;
    Source s = source_;
    const int64_t bytes = (to - from) * s.row_stride;
    char *data = static_cast<char *>(scratch(Scratch::image, static_cast<size_t>(bytes + s.row_stride + 64)));
    s.data = data;
    s.first = from;
    s.padding = data + bytes;
    pad(data + bytes);
    convert(from, to, data);
    return s;
}

Source ImagePixels::whole() const {
    Source s = source_;
    if (kind_ == OperandKind::f32 && q_.dtype == DType::f32 && channels_last_) { // as it is
        s.data = x_;
        char *padding = static_cast<char *>(scratch(Scratch::image, static_cast<size_t>(s.row_stride)));
        pad(padding);
        s.padding = padding;
        return s;
    }
    const int64_t bytes = g_.batch * pixels_ * s.row_stride;
    char *image =
        static_cast<char *>(scratch(Scratch::image, static_cast<size_t>(bytes + s.row_stride + 64)));
    s.data = image;
    s.padding = image + bytes;
    pad(image + bytes);
    const int64_t sample = g_.channels * pixels_, strips = std::max<int64_t>(1, div_up(pixels_, kPlaneStrip));
    const int64_t tasks = pass_tasks(g_.batch * sample, g_.batch * strips);
    parallel_tasks(tasks, [&](int64_t t) {
        const auto pixel = [&](int64_t strip) {
            return strip / strips * pixels_ + strip % strips * kPlaneStrip;
        };
        const int64_t from = pixel(chunk_begin(g_.batch * strips, tasks, t));
        convert(from, pixel(chunk_begin(g_.batch * strips, tasks, t + 1)), image + from * s.row_stride);
    });
    if (q_.mode != ActQuant::fixed || kind_ == OperandKind::f32 || finite())
        return s;
    for (int64_t b = 0; b < g_.batch; ++b) { // rare: look which samples it was
        bool finite = true;
        isa_.amax(x_ + b * sample * size_of(q_.dtype), q_.dtype, sample, &finite);
        if (finite)
            continue;
        const_cast<float *>(s.scales)[b] = std::numeric_limits<float>::quiet_NaN();
        how_[b].blank = true;
        convert(b * pixels_, (b + 1) * pixels_, image + b * pixels_ * s.row_stride);
    }
    finite_.store(true, std::memory_order_relaxed);
    return s;
}

Source Source::ready(int64_t m0, int64_t m1) const { return pixels ? pixels->ready(m0, m1) : *this; }
int64_t Source::together(int64_t unit, int64_t threads) const {
    return pixels ? pixels->together(unit, threads) : round_up(m, unit);
}
Source Source::whole() const { return pixels ? pixels->whole() : *this; }

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
