#include "core/parallel.h"
#include "kernels/common/product.h"

#include <algorithm>

namespace tautorch {
namespace {

struct Job {
    const Isa &isa;
    const uint8_t *down, *up;
    const Source &x;
    Epilogue first; // of down: to a float tile
    Output out;
    ActQuant inner; // dynamic, of the float intermediate

    const PackHeader &hd() const { return header_of(down); }
    const PackHeader &hu() const { return header_of(up); }
    int64_t inner_width() const { return hd().groups * hd().n; } // floats in a row of the intermediate
    int64_t operand_stride() const {
        const OperandKind kind = operand_of(up);
        return kind == OperandKind::f32 ? 0 : round_up(hu().groups * inner_group(), 64);
    }
    // Bytes of one group's quantised intermediate.
    int64_t inner_group() const { return round_up(hu().k, hu().kr) * operand_bytes(operand_of(up)); }

    // rows m0 .. of the intermediate, panels [p0, p1) of down, to inner [row][inner_width].
    void run_down(int64_t m0, int rows, int64_t p0, int64_t p1, const void **pointers,
                  float *inner_rows) const {
        Output o;
        o.epilogue = first;
        o.row_stride = inner_width();
        o.data = inner_rows;
        float scales[kBlockRows];
        const float *scale = x.row_scales(m0, rows, scales) ? scales : nullptr;
        for (int64_t g = 0; g < hd().groups; ++g) {
            x.fill(g, m0, rows, pointers, kBlockRows);
            gemm_block(isa, down, g, pointers, kBlockRows, rows, p0, p1, o, 0, scale); // the tile's own row 0
        }
    }

    // Quantises rows of the intermediate; each group has scales of its own: scale[g * rows + r].
    void requantize(const float *inner_rows, int rows, uint8_t *operand, float *scale) const {
        const OperandKind kind = operand_of(up);
        if (kind == OperandKind::f32)
            return;
        const ActKind act = kind == OperandKind::s16 ? ActKind::s16 : ActKind::u8_shifted;
        for (int64_t g = 0; g < hu().groups; ++g)
            quantize_rows(isa, inner, act, inner_rows + g * hu().k, inner_width(), 0, rows, hu().k,
                          round_up(hu().k, hu().kr), operand + g * inner_group(), operand_stride(),
                          scale + g * rows);
    }

    void run_up(int64_t m0, int rows, int64_t p0, int64_t p1, const void **pointers, const float *inner_rows,
                const uint8_t *operand, const float *scale) const {
        const bool floating = operand_of(up) == OperandKind::f32;
        for (int64_t g = 0; g < hu().groups; ++g) {
            for (int r = 0; r < rows; ++r)
                pointers[r] = floating
                                  ? static_cast<const void *>(inner_rows + r * inner_width() + g * hu().k)
                                  : operand + r * operand_stride() + g * inner_group();
            gemm_block(isa, up, g, pointers, kBlockRows, rows, p0, p1, out, m0,
                       floating ? nullptr : scale + g * rows);
        }
    }
};

} // namespace

void lowrank_product(const uint8_t *down, const float *down_scale, const uint8_t *up, const ActQuant &quant,
                     const Source &x, const Output &out) {
    const PackHeader &hd = header_of(down), &hu = header_of(up);
    if (x.m == 0 || hu.n == 0)
        return;
    Job job = {*find_isa(hd.isa), down, up, x, {}, out, {}};
    job.first.w_scale = down_scale;
    job.first = with_correction(job.first, down, operand_of(down), quant);
    job.out.epilogue = with_correction(out.epilogue, up, operand_of(up), job.inner);

    const auto pointer_space = [&] {
        return static_cast<const void **>(
            scratch(Scratch::panel, sizeof(void *) * static_cast<size_t>(hd.taps * kBlockRows)));
    };
    const auto inner_space = [&](int64_t rows) {
        return static_cast<float *>(
            scratch(Scratch::inner, 4 * static_cast<size_t>(rows * job.inner_width() + kTileN)));
    };
    const auto operand_space = [&](int64_t rows) {
        return static_cast<uint8_t *>(
            scratch(Scratch::pointers, static_cast<size_t>(rows * job.operand_stride() + 64)));
    };
    const auto scale_space = [&](int64_t rows) {
        return static_cast<float *>(
            scratch(Scratch::inner_scales, 4 * static_cast<size_t>(rows * hu.groups)));
    };

    const int64_t macs_down = x.m * hd.groups * hd.n * hd.k * hd.taps,
                  macs_up = x.m * hu.groups * hu.n * hu.k;
    const Split whole =
        split_gemm(x.m, std::min(panels(hd), panels(hu)), macs_down + macs_up, hd.total + hu.total);
    if (whole.tn == 1 || x.m > kBlockRows) {
        const int64_t tasks = std::max(whole.tm, std::min(whole.tm * whole.tn, div_up(x.m, kBlockRows)));
        parallel_tasks(tasks, [&](int64_t t) {
            const void **pointers = pointer_space();
            float *inner_rows = inner_space(kTileRows);
            uint8_t *operand = operand_space(kTileRows);
            float *scale = scale_space(kTileRows);
            const int64_t end = chunk_begin(x.m, tasks, t + 1);
            for (int64_t m0 = chunk_begin(x.m, tasks, t); m0 < end; m0 += kTileRows) {
                const int rows = static_cast<int>(std::min<int64_t>(kTileRows, end - m0));
                job.run_down(m0, rows, 0, panels(hd), pointers, inner_rows);
                job.requantize(inner_rows, rows, operand, scale);
                job.run_up(m0, rows, 0, panels(hu), pointers, inner_rows, operand, scale);
            }
        });
        return;
    }
    // One block of rows: the threads share the panels of each factor, with one join between.
    const int rows = static_cast<int>(x.m);
    float *inner_rows = inner_space(rows);
    const Split d = split_gemm(1, panels(hd), macs_down, hd.total),
                u = split_gemm(1, panels(hu), macs_up, hu.total);
    parallel_tasks(d.tn, [&](int64_t t) {
        job.run_down(0, rows, chunk_begin(panels(hd), d.tn, t), chunk_begin(panels(hd), d.tn, t + 1),
                     pointer_space(), inner_rows);
    });
    uint8_t *operand = operand_space(rows);
    float *scale = scale_space(rows);
    job.requantize(inner_rows, rows, operand, scale);
    parallel_tasks(u.tn, [&](int64_t t) {
        job.run_up(0, rows, chunk_begin(panels(hu), u.tn, t), chunk_begin(panels(hu), u.tn, t + 1),
                   pointer_space(), inner_rows, operand, scale);
    });
}

} // namespace tautorch
