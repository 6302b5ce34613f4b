#include "core/parallel.h"
#include "kernels/common/product.h"

#include <algorithm>
#include <cmath>

namespace tautorch {
namespace {

// A block of rows on its way: operands for the first factor and, where they are others, for the residual.
struct Operands {
    Source x, residual;
    int64_t first = 0;            // the block's first row in them
    const float *added = nullptr; // a sparse residual's outputs, all rows of x, or null
    int64_t added_stride = 0;
};

struct Range {
    int64_t begin, end;
};

struct Job {
    const Isa &isa;
    const LowRank &a;
    Epilogue first;    // of down: to float rows
    Epilogue residual; // of the residual: to a float tile
    Output out;
    ActQuant inner; // dynamic, of the float intermediate

    explicit Job(const LowRank &args) : isa(*find_isa(header_of(args.down).isa)), a(args), out(args.out) {
        first.w_scale = a.down_scale;
        first = with_correction(first, a.down, operand_of(a.down), a.quant);
        out.epilogue = with_correction(out.epilogue, a.up, operand_of(a.up), inner);
        if (a.residual) {
            residual.w_scale = a.residual_scale;
            residual = with_correction(residual, a.residual, operand_of(a.residual), a.residual_quant());
        }
    }

    const PackHeader &hd() const { return header_of(a.down); }
    const PackHeader &hu() const { return header_of(a.up); }
    int64_t inner_width() const { return hd().groups * hd().n; } // floats in a row of the intermediate
    int64_t operand_stride() const {
        const OperandKind kind = operand_of(a.up);
        return kind == OperandKind::f32 ? 0 : round_up(hu().groups * inner_group(), 64);
    }
    // Bytes of one group's quantised intermediate.
    int64_t inner_group() const { return round_up(hu().k, hu().kr) * operand_bytes(operand_of(a.up)); }

    const void **pointer_space() const {
        return static_cast<const void **>(
            scratch(Scratch::panel, sizeof(void *) * static_cast<size_t>(hd().taps * kBlockRows)));
    }
    // Of the intermediate: as it is, quantised, and its scales.
    struct Inner {
        float *rows;
        uint8_t *operand;
        float *scale;
    };
    Inner inner_space(int64_t rows) const {
        return {static_cast<float *>(
                    scratch(Scratch::inner, 4 * static_cast<size_t>(rows * inner_width() + kTileN))),
                static_cast<uint8_t *>(
                    scratch(Scratch::pointers, static_cast<size_t>(rows * operand_stride() + 64))),
                static_cast<float *>(
                    scratch(Scratch::inner_scales, 4 * static_cast<size_t>(rows * hu().groups)))};
    }

    // Panels of down for a block of rows, to inner.rows.
    void run_down(const Operands &in, int rows, Range panels, const void **pointers,
                  const Inner &inner) const {
        Output o;
        o.epilogue = first;
        o.row_stride = inner_width();
        o.data = inner.rows;
        float scales[kBlockRows];
        const float *scale = in.x.row_scales(in.first, rows, scales) ? scales : nullptr;
        for (int64_t g = 0; g < hd().groups; ++g) {
            in.x.fill(g, in.first, rows, pointers, kBlockRows);
            gemm_block(isa, a.down, g, pointers, kBlockRows, rows, panels.begin, panels.end, o, 0, scale);
        }
    }

    // Quantises rows of the intermediate; each group has scales of its own: scale[g * rows + r].
    void requantize(int rows, const Inner &inner) const {
        const OperandKind kind = operand_of(a.up);
        if (kind == OperandKind::f32)
            return;
        for (int64_t g = 0; g < hu().groups; ++g)
            quantize_rows(isa, this->inner, act_of(kind), inner.rows + g * hu().k, inner_width(), 0, rows,
                          hu().k, round_up(hu().k, hu().kr), inner.operand + g * inner_group(),
                          operand_stride(), inner.scale + g * rows);
    }

    // Panels of up for a block of rows that begins at row m0 of the output.
    void run_up(const Operands &in, int64_t m0, int rows, Range panels, const void **pointers,
                const Inner &inner) const {
        const bool floating = operand_of(a.up) == OperandKind::f32;
        for (int64_t g = 0; g < hu().groups; ++g) {
            for (int r = 0; r < rows; ++r)
                pointers[r] = floating
                                  ? static_cast<const void *>(inner.rows + r * inner_width() + g * hu().k)
                                  : inner.operand + r * operand_stride() + g * inner_group();
            const float *scale = floating ? nullptr : inner.scale + g * rows;
            if (a.residual)
                run_up_with_residual(in, m0, rows, panels, pointers, scale);
            else
                gemm_block(isa, a.up, g, pointers, kBlockRows, rows, panels.begin, panels.end, out, m0,
                           scale);
        }
    }

    // Panel by panel: the residual's float tile (where it is not there already), then up's, which adds it on
    // its way out.
    void run_up_with_residual(const Operands &in, int64_t m0, int rows, Range panels,
                              const void *const *pointers, const float *scale) const {
        Output sum = out;
        if (in.added) {
            sum.epilogue.addend_stride = in.added_stride;
            for (int64_t p = panels.begin; p < panels.end; ++p) {
                sum.epilogue.addend = in.added + in.first * in.added_stride + p * hu().nr;
                gemm_block(isa, a.up, 0, pointers, kBlockRows, rows, p, p + 1, sum, m0, scale);
            }
            return;
        }
        alignas(64) float tile[kTileRows * kTileN];
        const void *x[kTileRows];
        float scales[kTileRows];
        const bool scaled = in.residual.row_scales(in.first, rows, scales);
        in.residual.fill(0, in.first, rows, x, kTileRows);
        Output to;
        to.epilogue = residual;
        to.row_stride = kTileN;
        sum.epilogue.addend = tile;
        for (int64_t p = panels.begin; p < panels.end; ++p) {
            to.data = tile - p * hu().nr; // gemm_block goes to output p * nr of a row
            gemm_block(isa, a.residual, 0, x, kTileRows, rows, p, p + 1, to, 0, scaled ? scales : nullptr);
            gemm_block(isa, a.up, 0, pointers, kBlockRows, rows, p, p + 1, sum, m0, scale);
        }
    }

    // All of it for one block of rows, and panels of the output.
    void run_block(const Operands &in, int64_t m0, int rows, Range panels_up) const {
        const void **pointers = pointer_space();
        const Inner inner = inner_space(rows);
        run_down(in, rows, {0, panels(hd())}, pointers, inner);
        requantize(rows, inner);
        run_up(in, m0, rows, panels_up, pointers, inner);
    }
};

// How the work is cut.
struct Cut {
    enum How { rows, panels, two_joins } how = rows;
    int64_t tasks = 1, tasks_down = 1;
};

// By cost, in nanoseconds of one core: threads take rows of their own and read all weights, or share the rows
// and take panels of up, each computing down again for itself, or share down too, with a join more.
Cut cheapest(const Job &job, int64_t m, int64_t threads) {
    const PackHeader &hd = job.hd(), &hu = job.hu();
    const bool floating = operand_of(job.a.up) == OperandKind::f32;
    // AMX multiplies tiles of 16 rows, there or not. Without a residual outputs on their way out weigh more.
    const bool tiles = !floating && job.isa.even_rows && job.a.residual;
    const double macs_per_ns = floating ? 110 : tiles ? 1200 : 450, join = 600;
    const auto time = [&](double rows, double macs, double bytes) {
        const double bytes_per_ns = !tiles ? 60 : bytes > 1e6 ? 40 : 100; // from L3 or L2
        rows = tiles ? std::ceil(rows / 16) * 16 : rows;
        return std::max(rows * macs / macs_per_ns, bytes / bytes_per_ns);
    };
    const double macs_down = static_cast<double>(hd.groups * hd.n * hd.k * hd.taps),
                 bytes_down = static_cast<double>(hd.total);
    double macs_up = static_cast<double>(hu.groups * hu.n * hu.k), bytes_up = static_cast<double>(hu.total);
    if (job.a.residual && !job.a.sparse_residual()) {
        const PackHeader &hr = header_of(job.a.residual);
        macs_up += static_cast<double>(hr.n * hr.k);
        bytes_up += static_cast<double>(hr.total);
    }
    const double quantise = floating ? 0 : static_cast<double>(hd.groups * hd.k) / 10; // of a row
    const double rows = static_cast<double>(m), t = static_cast<double>(threads);
    const int64_t n_down = std::min(threads, panels(hd)), n_up = std::min(threads, panels(hu));
    const double share_down = 1 / static_cast<double>(n_down), share_up = 1 / static_cast<double>(n_up);

    Cut best;
    double least = rows * quantise + time(rows, macs_down, bytes_down) + time(rows, macs_up, bytes_up);
    // Threads gain less than a microsecond here, and lose more where they have to be woken.
    if (least < 5000)
        return best;
    const auto consider = [&](Cut cut, double cost) {
        if (cost < least) {
            best = cut;
            least = cost;
        }
    };
    if (threads > 1 && m > 1) {
        const double own = std::max(rows / t, 1.0);
        consider({Cut::rows, std::min(threads, m), 1},
                 own * quantise + time(own, macs_down, bytes_down) + time(own, macs_up, bytes_up) + join);
    }
    if (n_up > 1 && m <= kTileRows) {
        const double up = time(rows, macs_up * share_up, bytes_up * share_up);
        consider({Cut::panels, n_up, 1}, rows * quantise + time(rows, macs_down, bytes_down) + up + join);
        if (n_down > 1)
            consider({Cut::two_joins, n_up, n_down},
                     rows * quantise + time(rows, macs_down * share_down, bytes_down * share_down) + up +
                         2 * join);
    }
    return best;
}

// operands(m0, rows) gives the operands of a block, in scratch of the calling thread.
template <class OperandsOf> void run(const Job &job, int64_t m, const OperandsOf &operands) {
    const int64_t n_down = panels(job.hd()), n_up = panels(job.hu());
    const Cut cut = cheapest(job, m, max_threads());
    const auto part = [](int64_t n, int64_t parts, int64_t i) {
        return Range{chunk_begin(n, parts, i), chunk_begin(n, parts, i + 1)};
    };
    if (cut.how == Cut::rows) {
        parallel_tasks(cut.tasks, [&](int64_t t) {
            const Range own = part(m, cut.tasks, t);
            const int64_t step = job.a.residual ? kTileRows : block_rows(own.end - own.begin);
            for (int64_t m0 = own.begin; m0 < own.end; m0 += step) {
                const int rows = static_cast<int>(std::min(step, own.end - m0));
                job.run_block(operands(m0, rows), m0, rows, {0, n_up});
            }
        });
        return;
    }
    const int rows = static_cast<int>(m);
    if (cut.how == Cut::panels) {
        parallel_tasks(cut.tasks, [&](int64_t t) {
            job.run_block(operands(0, rows), 0, rows, part(n_up, cut.tasks, t));
        });
        return;
    }
    // The calling thread's scratch is read by all; tasks ask for none but pointers.
    const Operands in = operands(0, rows);
    const Job::Inner inner = job.inner_space(rows);
    parallel_tasks(cut.tasks_down, [&](int64_t t) {
        job.run_down(in, rows, part(n_down, cut.tasks_down, t), job.pointer_space(), inner);
    });
    job.requantize(rows, inner);
    parallel_tasks(cut.tasks, [&](int64_t t) {
        job.run_up(in, 0, rows, part(n_up, cut.tasks, t), job.pointer_space(), inner);
    });
}

// Sparse products want other blocks of rows and threads than panels do: they come first, to a buffer, for
// as many rows as keep that in cache.
void with_sparse_residual(const LowRank &a, const void *x, int64_t stride, int64_t m) {
    constexpr int64_t kFloats = 128 * 1024; // of the buffer, for each thread
    const PackHeader &hd = header_of(a.down), &hr = header_of(a.residual);
    const Isa &isa = *find_isa(hd.isa);
    const OperandKind kind = operand_of(a.down), kind_r = operand_of(a.residual);
    const int64_t width = round_up(hr.n, kTileN);
    const int64_t most = std::max<int64_t>(kBlockRows / 3, round_up(kFloats / width, kTileN)) * max_threads();
    const int64_t step = div_up(m, div_up(m, most));
    float *buffer = static_cast<float *>(scratch(Scratch::tile, static_cast<size_t>(4 * step * width)));
    Output to;
    to.epilogue.w_scale = a.residual_scale;
    to.epilogue = with_correction(to.epilogue, a.residual, kind_r, a.residual_quant());
    to.row_stride = width;
    to.data = buffer;
    for (int64_t m0 = 0; m0 < m; m0 += step) {
        const int64_t rows = std::min(step, m - m0);
        const auto source = [&](ActQuant q, OperandKind as, int64_t k, int64_t kr) {
            if (q.mode == ActQuant::given && q.given_scales > 1)
                q.given_scale += m0;
            return matrix_source(isa, q, as, static_cast<const char *>(x) + m0 * stride * size_of(q.dtype),
                                 stride, rows, k, kr);
        };
        Source own = source(a.residual_quant(), kind_r, hr.k, kind == kind_r ? hd.kr : hr.kr);
        product(a.residual, own, to);
        if (kind != kind_r) // the same scratch
            own = source(a.quant, kind, hd.k, hd.kr);
        LowRank part = a;
        part.out.data =
            static_cast<char *>(a.out.data) + m0 * a.out.row_stride * size_of(a.out.epilogue.out_dtype);
        run(Job(part), rows, [&](int64_t first, int) { return Operands{own, {}, first, buffer, width}; });
    }
}

} // namespace

ActQuant LowRank::residual_quant() const {
    ActQuant q = quant;
    if (operand_of(residual) == OperandKind::f32)
        q.mode = ActQuant::none;
    else if (q.mode == ActQuant::none) // float factors
        q.mode = ActQuant::dynamic;
    return q;
}

bool LowRank::sparse_residual() const {
    const PackKind kind = residual ? header_of(residual).kind : PackKind::dense_i8;
    return kind != PackKind::dense_i8 && kind != PackKind::dense_f32;
}

void lowrank_product(const LowRank &a, const Source &x) {
    if (x.m == 0 || header_of(a.up).n == 0)
        return;
    run(Job(a), x.m, [&](int64_t m0, int) { return Operands{x, {}, m0}; });
}

void lowrank_product(const LowRank &a, const void *x, int64_t stride, int64_t m) {
    const PackHeader &h = header_of(a.down);
    if (m == 0 || header_of(a.up).n == 0)
        return;
    if (a.sparse_residual()) {
        with_sparse_residual(a, x, stride, m);
        return;
    }
    const Job job(a);
    const OperandKind kind = operand_of(a.down);
    run(job, m, [&](int64_t m0, int rows) {
        Operands o;
        o.x = block_source(job.isa, a.quant, kind, x, stride, m0, rows, h.k, h.kr, Scratch::rows,
                           Scratch::scales);
        if (!a.residual)
            return o;
        const PackHeader &hr = header_of(a.residual);
        o.residual = operand_of(a.residual) == kind && hr.kr == h.kr
                         ? o.x
                         : block_source(job.isa, a.residual_quant(), operand_of(a.residual), x, stride, m0,
                                        rows, hr.k, hr.kr, Scratch::image, Scratch::tile);
        return o;
    });
}

} // namespace tautorch
