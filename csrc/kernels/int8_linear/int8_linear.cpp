#include "kernels/int8_linear/int8_linear.h"

#include "core/parallel.h"
#include "kernels/common/product_w8.h"

#include <algorithm>
#include <limits>

namespace tautorch {
namespace {

// Operand rows of one chunk: quantised, converted to float, or float rows as they are.
struct Operand {
    const char *data;
    int64_t stride; // bytes
};

int64_t operand_stride(const Isa &isa, const PackHeader &h) {
    // An odd number of cache lines: at a multiple of 4 KB all rows of a tile would share the same set of L1.
    return h.kind == PackKind::dense_i8 ? round_up(round_up(h.k, h.kr) * act_bytes(isa.act), 64) | 64
                                        : 4 * h.k;
}

Operand prepare(const Isa &isa, const LinearArgs &a, const PackHeader &h, int64_t m0, int64_t rows,
                uint8_t *buffer, float *row_scale) {
    const char *x = static_cast<const char *>(a.x);
    if (h.kind == PackKind::dense_i8) {
        const int64_t stride = operand_stride(isa, h);
        quantize_rows(isa, a.quant, isa.act, x, a.x_stride, m0, rows, h.k, round_up(h.k, h.kr), buffer,
                      stride, row_scale);
        return {reinterpret_cast<char *>(buffer), stride};
    }
    if (a.quant.dtype == DType::f32)
        return {x + 4 * m0 * a.x_stride, 4 * a.x_stride};
    for (int64_t r = 0; r < rows; ++r)
        isa.to_f32(x + (m0 + r) * a.x_stride * size_of(a.quant.dtype), a.quant.dtype, h.k,
                   reinterpret_cast<float *>(buffer) + r * h.k);
    return {reinterpret_cast<char *>(buffer), 4 * h.k};
}

constexpr int64_t kDigitRows = 32; // whose digits stay in L2 beside a panel

bool by_digits(const PackHeader &h, const Isa &isa, int64_t m) {
    return h.kind == PackKind::dense_w8 && isa.digits && m <= isa.digits->most_rows &&
           h.k >= kLeastDigitInputs && h.k <= kMostDigitInputs;
}

int significant_bits(DType dtype) { return dtype == DType::f32 ? 24 : dtype == DType::f16 ? 11 : 8; }

// The same as `multiply`, for up to kDigitRows float rows by int8 weights.
void multiply_digits(const Isa &isa, const LinearArgs &a, const Output &out, Operand x, int64_t m0,
                     int64_t rows, int64_t p0, int64_t p1) {
    const PackHeader &h = header_of(a.packed);
    const DigitKernels &kernels = *isa.digits;
    const int64_t bytes = round_up(digit_bytes(h.k), 64),
                  row_bytes = bytes + round_up(4 * most_apart(h.k), 64);
    int8_t *buffer = static_cast<int8_t *>(scratch(Scratch::inner, static_cast<size_t>(rows * row_bytes)));
    const float *effective = reinterpret_cast<const float *>(a.packed + h.colsum_off);
    const void *pointers[kDigitRows];
    DigitRow row[kDigitRows];
    for (int64_t r = 0; r < rows; ++r) {
        int8_t *at = buffer + r * row_bytes;
        pointers[r] = x.data + r * x.stride;
        if (!kernels.row(static_cast<const float *>(pointers[r]), h.k, significant_bits(a.quant.dtype), at,
                         reinterpret_cast<int32_t *>(at + bytes), row[r]))
            row[r].needs = std::numeric_limits<float>::quiet_NaN(); // fits nowhere
    }
    for (int64_t p = p0; p < p1; ++p) {
        const int width = panel_width(h, p);
        const int cols = static_cast<int>(std::min<int64_t>(width, h.n - p * h.nr));
        const float has = width >= kernels.least_width ? effective[p] : -1.0f;
        const auto run = [&](int64_t r, auto &&like) { // of rows from r on
            int64_t end = r + 1;
            while (end < rows && like(row[end]))
                ++end;
            return static_cast<int>(end - r);
        };
        const auto fits = [has](const DigitRow &d) { return d.needs <= has; };
        for (int64_t r = 0; r < rows;) {
            if (!fits(row[r])) {
                const int count = run(r, [&](const DigitRow &d) { return !fits(d); });
                gemm_block(isa, a.packed, 0, pointers + r, kDigitRows, count, p, p + 1, out, m0 + r, nullptr);
                r += count;
                continue;
            }
            alignas(64) float y[2 * kTileN];
            const int count =
                std::min(std::min(2, kernels.at_once / row[r].digits),
                         run(r, [&](const DigitRow &d) { return fits(d) && d.digits == row[r].digits; }));
            kernels.product(row + r, count, h.k, reinterpret_cast<const int8_t *>(panel_data(a.packed, 0, p)),
                            width, y);
            store_tile(isa, out, y, kTileN, false, m0 + r, count, p * h.nr, cols, nullptr);
            r += count;
        }
    }
}

void multiply(const Isa &isa, const LinearArgs &a, const Output &out, Operand x, int64_t m0, int64_t rows,
              int64_t p0, int64_t p1, const float *row_scale) {
    if (by_digits(header_of(a.packed), isa, a.m)) {
        const int64_t parts = div_up(rows, kDigitRows);
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t begin = chunk_begin(rows, parts, i), end = chunk_begin(rows, parts, i + 1);
            multiply_digits(isa, a, out, {x.data + begin * x.stride, x.stride}, m0 + begin, end - begin, p0,
                            p1);
        }
        return;
    }
    const void *pointers[kBlockRows];
    const int64_t step = block_rows(rows);
    for (int64_t b = 0; b < rows; b += step) {
        const int n = static_cast<int>(std::min(step, rows - b));
        for (int r = 0; r < n; ++r)
            pointers[r] = x.data + (b + r) * x.stride;
        gemm_block(isa, a.packed, 0, pointers, kBlockRows, n, p0, p1, out, m0 + b,
                   row_scale ? row_scale + b : nullptr);
    }
}

struct Cut {
    Split split;
    bool shared = false; // rows are prepared once for all threads, which wait for each other in between
};

Cut cut(const Isa &isa, const LinearArgs &a, const PackHeader &h) {
    Cut c;
    const int64_t n_panels = panels(h), macs = a.m * h.n * h.k;
    const int64_t threads = threads_for(macs, h.total);
    if (threads == 1)
        return c;
    // A thread with rows of its own prepares these alone, but reads all weights: the cut for few outputs, and
    // for many rows by weights that L2 and a part of L3 hold.
    const bool by_rows = a.m >= isa.own_rows * threads &&
                         (h.n < 512 * threads || (a.m > kBlockRows && h.total < int64_t{3} << 20));
    Split &s = c.split;
    if (by_rows) {
        s.tm = threads;
    } else {
        s.tn = std::min(threads, n_panels);
        s.tm = std::max<int64_t>(1, std::min(threads / s.tn, a.m / 24));
    }
    // Waiting and reading rows that another core wrote costs about 3 us at 64 rows; a thread quantises some
    // 15 elements a nanosecond and multiplies 500.
    const int64_t again = a.m / s.tm * h.k / 15, product = macs / threads / 500;
    const bool as_it_is = h.kind != PackKind::dense_i8 && a.quant.dtype == DType::f32;
    c.shared = s.tn > 1 && !as_it_is && again > 3000 + product / 20;
    return c;
}

} // namespace

void int8_linear(const LinearArgs &a) {
    const PackHeader &h = header_of(a.packed);
    const Isa &isa = *find_isa(h.isa);
    if (a.m == 0 || h.n == 0)
        return;
    const bool integer = h.kind == PackKind::dense_i8;
    Output out = a.out;
    out.epilogue = with_correction(a.out.epilogue, a.packed, operand_of(a.packed), a.quant);
    const int64_t stride = operand_stride(isa, h), n_panels = panels(h);
    const Cut c = cut(isa, a, h);
    const int64_t tm = c.split.tm, tn = c.split.tn;
    const auto buffers = [&](int64_t rows, float **scale) {
        *scale =
            integer ? static_cast<float *>(scratch(Scratch::scales, static_cast<size_t>(4 * rows))) : nullptr;
        return static_cast<uint8_t *>(scratch(Scratch::rows, static_cast<size_t>(rows * stride + 64)));
    };
    if (!c.shared) {
        // Every thread prepares its rows, a block at a time, and runs its panels over them.
        parallel_tasks(tm * tn, [&](int64_t t) {
            const int64_t i = t / tn, j = t % tn;
            const int64_t begin = chunk_begin(a.m, tm, i), end = chunk_begin(a.m, tm, i + 1);
            const int64_t step = block_rows(end - begin);
            for (int64_t m0 = begin; m0 < end; m0 += step) {
                const int64_t rows = std::min(step, end - m0);
                float *scale = nullptr;
                uint8_t *buffer = buffers(rows, &scale);
                const Operand x = prepare(isa, a, h, m0, rows, buffer, scale);
                multiply(isa, a, out, x, m0, rows, chunk_begin(n_panels, tn, j),
                         chunk_begin(n_panels, tn, j + 1), scale);
            }
        });
        return;
    }
    // Threads share the rows, then spread the panels.
    float *scale = nullptr;
    uint8_t *buffer = buffers(a.m, &scale);
    const int64_t parts = a.m * h.k < 65'536 ? 1 : std::min(a.m, tm * tn);
    Operand x = {nullptr, 0};
    parallel_tasks(parts, [&](int64_t t) {
        const int64_t m0 = chunk_begin(a.m, parts, t), m1 = chunk_begin(a.m, parts, t + 1);
        const Operand part =
            prepare(isa, a, h, m0, m1 - m0, buffer + m0 * stride, scale ? scale + m0 : nullptr);
        if (t == 0)
            x = part;
    });
    parallel_tasks(tm * tn, [&](int64_t t) {
        const int64_t i = t / tn, j = t % tn;
        const int64_t m0 = chunk_begin(a.m, tm, i), m1 = chunk_begin(a.m, tm, i + 1);
        multiply(isa, a, out, {x.data + m0 * x.stride, x.stride}, m0, m1 - m0, chunk_begin(n_panels, tn, j),
                 chunk_begin(n_panels, tn, j + 1), scale ? scale + m0 : nullptr);
    });
}

} // namespace tautorch
