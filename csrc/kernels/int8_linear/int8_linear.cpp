#include "kernels/int8_linear/int8_linear.h"

#include "core/parallel.h"

#include <algorithm>

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

void multiply(const Isa &isa, const LinearArgs &a, const Output &out, Operand x, int64_t m0, int64_t rows,
              int64_t p0, int64_t p1, const float *row_scale) {
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

} // namespace

void int8_linear(const LinearArgs &a) {
    const PackHeader &h = header_of(a.packed);
    const Isa &isa = *find_isa(h.isa);
    if (a.m == 0 || h.n == 0)
        return;
    const bool integer = h.kind == PackKind::dense_i8;
    Output out = a.out;
    out.epilogue = with_correction(a.out.epilogue, a.packed, operand_of(a.packed), a.quant);
    const int64_t stride = operand_stride(isa, h);
    Split split = split_gemm(a.m, panels(h), a.m * h.n * h.k, h.total);
    // Where the weights are much larger than x, threads share x and take panels of their own: each then reads
    // its part of the weights once, not all of them.
    if (split.tm > 1 && panels(h) >= 4 * split.tm && h.n >= 2 * a.m)
        split = {1, split.tm};
    const auto buffers = [&](int64_t rows, float **scale) {
        *scale =
            integer ? static_cast<float *>(scratch(Scratch::scales, static_cast<size_t>(4 * rows))) : nullptr;
        return static_cast<uint8_t *>(scratch(Scratch::rows, static_cast<size_t>(rows * stride + 64)));
    };
    if (split.tn == 1) {
        // Every thread quantises its own rows, a block at a time, and runs all panels over them.
        parallel_tasks(split.tm, [&](int64_t t) {
            const int64_t begin = chunk_begin(a.m, split.tm, t), end = chunk_begin(a.m, split.tm, t + 1);
            const int64_t step = block_rows(end - begin);
            for (int64_t m0 = begin; m0 < end; m0 += step) {
                const int64_t rows = std::min(step, end - m0);
                float *scale = nullptr;
                uint8_t *buffer = buffers(rows, &scale);
                const Operand x = prepare(isa, a, h, m0, rows, buffer, scale);
                multiply(isa, a, out, x, m0, rows, 0, panels(h), scale);
            }
        });
        return;
    }
    // Threads share the rows, then spread the panels.
    float *scale = nullptr;
    uint8_t *buffer = buffers(a.m, &scale);
    const int64_t parts = a.m * h.k < 65'536 ? 1 : std::min(a.m, split.tm * split.tn);
    Operand x = {nullptr, 0};
    parallel_tasks(parts, [&](int64_t t) {
        const int64_t m0 = chunk_begin(a.m, parts, t), m1 = chunk_begin(a.m, parts, t + 1);
        const Operand part =
            prepare(isa, a, h, m0, m1 - m0, buffer + m0 * stride, scale ? scale + m0 : nullptr);
        if (t == 0)
            x = part;
    });
    parallel_tasks(split.tm * split.tn, [&](int64_t t) {
        const int64_t i = t / split.tn, j = t % split.tn;
        const int64_t m0 = chunk_begin(a.m, split.tm, i), m1 = chunk_begin(a.m, split.tm, i + 1);
        multiply(isa, a, out, {x.data + m0 * x.stride, x.stride}, m0, m1 - m0,
                 chunk_begin(panels(h), split.tn, j), chunk_begin(panels(h), split.tn, j + 1),
                 scale ? scale + m0 : nullptr);
    });
}

} // namespace tautorch
