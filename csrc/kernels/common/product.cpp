#include "kernels/common/product.h"

#include "core/parallel.h"
#include "kernels/common/panel_store.h"
#include "kernels/common/sell.h"
#include "kernels/common/sparse_f32.h"
#include "kernels/common/strips.h"

#include <algorithm>

namespace tautorch {
namespace {

struct Pointers {
    const void **at;
    explicit Pointers(int64_t count)
        : at(static_cast<const void **>(
              scratch(Scratch::panel, static_cast<size_t>(count) * sizeof(void *)))) {}
};

// A panel of `w` rows of x, input-major, or part of `parts` of its inputs. Rows past the end repeat the last
// one.
void build_panel(const Isa &isa, const PackHeader &h, const Source &x, int64_t group, int64_t m0, int rows,
                 int w, const void **pointers, void *panel, int64_t part = 0, int64_t parts = 1) {
    // Parts of the inputs begin where the transposition's steps of 16 do.
    const int64_t steps = div_up(h.k, 16);
    const int64_t k0 = 16 * chunk_begin(steps, parts, part);
    const int64_t k1 = std::min(h.k, 16 * chunk_begin(steps, parts, part + 1));
    x.fill(group, m0, rows, pointers, kTileN);
    const uint8_t *ordered[kTileN];
    for (int64_t t = 0; t < h.taps; ++t) {
        for (int r = 0; r < w; ++r) {
            const int at = w == kTileN ? isa.panel_order[r] : r;
            ordered[at] = static_cast<const uint8_t *>(pointers[t * kTileN + std::min(r, rows - 1)]) + k0;
        }
        isa.panel_u8(ordered, w, k1 - k0, x.flip, static_cast<uint8_t *>(panel) + (t * h.k + k0) * w);
    }
}

// Outputs of sparse groups [s0, s1) of one convolution group.
void run_panel(const Isa &isa, const uint8_t *packed, int64_t group, const void *panel, int w, int64_t s0,
               int64_t s1, const Output &out, int64_t m, int64_t m0, int rows, const float *scale) {
    const PackHeader &h = header_of(packed);
    const int64_t per_group = div_up(h.n, h.gs), lists = h.groups * per_group;
    const uint32_t *start = reinterpret_cast<const uint32_t *>(packed + h.start_off) + group * per_group;
    const uint16_t *index = reinterpret_cast<const uint16_t *>(packed + h.index_off);
    const uint8_t *data = packed + h.data_off;
    alignas(64) int32_t acc[kTileOutputs * kTileN];
    // The kernel scales its sums while they are in registers, lanes being rows; what is left to the epilogue
    // then is to turn, add, activate and convert. Single outputs lose by it: 10 to 20 % at 1024 rows on
    // Zen 4.
    const Epilogue &e = out.epilogue;
    const bool scaled =
        h.gs == 4 && w == kTileN && scale && isa.sparse_i8_scaled && e.out_dtype != DType::i32;
    Output rest = out;
    if (scaled) {
        rest.epilogue.acc_float = true;
        rest.epilogue.w_scale = nullptr;
        if (!e.addend) {
            rest.epilogue.bias = nullptr;
            if (e.activation == Activation::relu)
                rest.epilogue.activation = Activation::none;
        }
    }
    const bool relu = !e.addend && e.activation == Activation::relu;
    const PanelStore store(isa, rest, acc, w, scaled && !out.along_m);
    const int64_t size = size_of(e.out_dtype), row_bytes = out.row_stride * size;
    // Zen 4, 4x1, float out: fetching the lines of a tile while its lists run takes 10 to 25 % off where the
    // output is 8 MB and more, 5 to 20 % at 2 MB where lists are long, and adds 3 % there where they are
    // short.
    const int64_t quads = h.entries / std::max<int64_t>(1, h.blocks * lists);
    const bool fetch = !out.along_m && (m * row_bytes > int64_t{3} << 20 ||
                                        (m * row_bytes > int64_t{1} << 20 && quads >= 128));
    const char *base = static_cast<const char *>(out.data);
    const int64_t step = kTileOutputs / h.gs;
    for (int64_t s = s0; s < s1; s += step) {
        const int64_t end = std::min(s1, s + step), n0 = group * h.n + s * h.gs;
        const int cols = static_cast<int>(std::min((end - s) * h.gs, h.n - s * h.gs));
        for (int64_t b = 0; b < h.blocks; ++b) {
            const uint8_t *x = static_cast<const uint8_t *>(panel) + b * block_inputs(h) * w;
            const int8_t *values = reinterpret_cast<const int8_t *>(data);
            if (scaled && b + 1 == h.blocks)
                isa.sparse_i8_scaled(x, start + b * lists, index, values, s, end, b > 0, acc,
                                     {scale, e.w_scale ? e.w_scale + n0 : nullptr,
                                      e.bias && !e.addend ? e.bias + n0 : nullptr,
                                      e.correction ? e.colsum + n0 : nullptr, e.correction, relu, cols,
                                      base + m0 * row_bytes + n0 * size, row_bytes, cols * size,
                                      fetch ? rows : 0, !out.along_m});
            else
                isa.sparse_i8(h.gs, w, x, start + b * lists, index, values, s, end, b > 0, acc);
        }
        for (int c = 0; w < 16 && c < cols; c += kTileN)
            store_tile(isa, rest, acc + c * w, w, true, m0, rows, n0 + c, std::min(kTileN, cols - c), scale);
        if (w >= 16)
            store(m0, rows, n0, cols, scaled ? nullptr : scale);
    }
}

// Row blocks of 64, then of 16 where 32 rows or fewer are left, then one of 4 where the kernel takes it: an
// unfilled lane costs as much as a used one.
struct RowBlocks {
    int64_t m;
    bool narrow = false;
    int64_t wide() const { return m / 64 + (m % 64 > 32 ? 1 : 0); }
    int64_t count() const { return wide() + (m % 64 > 32 ? 0 : div_up(m % 64, 16)); }
    int width(int64_t i) const { return i < wide() ? 64 : narrow && m - begin(i) <= 4 ? 4 : 16; }
    int64_t begin(int64_t i) const { return i < wide() ? i * 64 : wide() * 64 + (i - wide()) * 16; }
    // The block that begins nearest to row r.
    int64_t nearest(int64_t r) const {
        return r < wide() * 64 ? (r + 32) / 64 : std::min(count(), wide() + (r - wide() * 64 + 8) / 16);
    }
    int rows(int64_t i) const { return static_cast<int>(std::min<int64_t>(width(i), m - begin(i))); }
};

// First sparse group whose entries start at or after part i of n of the group's entries.
int64_t balanced(const uint32_t *start, int64_t groups, int64_t n, int64_t i) {
    if (i == n)
        return groups;
    const uint32_t from = start[0];
    const auto target = static_cast<uint32_t>(from + (start[groups] - from) * static_cast<uint64_t>(i) /
                                                         static_cast<uint64_t>(n));
    return std::lower_bound(start, start + groups, target) - start;
}

int64_t lists_threads(const PackHeader &h, int64_t m) {
    // A panel of 16 rows costs the same with one of them used.
    const int64_t work = h.entries * h.gs * 4 * round_up(m, 16);
    return work < 1'000'000 ? 1 : max_threads();
}

// Rows of a matrix: who multiplies a block of them quantises it, too. Where there are fewer blocks than
// threads, `parts` threads quantise the same rows, each for itself, and take a part of the outputs. Lines
// that one core wrote and another reads cost as much, and at times far more: 64 x 4096 x 1024, 95 % zeros, 80
// us like this, 83 or 200 us with a common panel.
void own_rows_product(const Isa &isa, const LinearArgs &a, const Output &out, int64_t threads) {
    const PackHeader &h = header_of(a.packed);
    const RowBlocks blocks{a.m, isa.narrow_panels};
    const int64_t groups = div_up(h.n, h.gs), count = blocks.count(),
                  parts = std::max<int64_t>(1, threads / count),
                  tasks = parts > 1 ? count * parts : std::min(threads, count);
    const uint32_t *start = reinterpret_cast<const uint32_t *>(a.packed + h.start_off);
    const auto run = [&](int64_t i, int64_t s0, int64_t s1) {
        const int rows = blocks.rows(i), w = blocks.width(i);
        const Source x = block_source(isa, a.quant, operand_of(a.packed), a.x, a.x_stride, blocks.begin(i),
                                      rows, h.k, h.kr, Scratch::rows, Scratch::scales);
        const Pointers pointers(h.taps * kTileN);
        void *panel = scratch(Scratch::inner, static_cast<size_t>(h.k * w));
        build_panel(isa, h, x, 0, 0, rows, w, pointers.at, panel);
        float scales[kTileN] = {};
        const float *scale = x.row_scales(0, rows, scales) ? scales : nullptr;
        run_panel(isa, a.packed, 0, panel, w, s0, s1, out, a.m, blocks.begin(i), rows, scale);
    };
    parallel_tasks(tasks, [&](int64_t t) {
        if (parts > 1)
            return run(t / parts, balanced(start, groups, parts, t % parts),
                       balanced(start, groups, parts, t % parts + 1));
        const auto first = [&](int64_t t) {
            return t == tasks ? count : blocks.nearest(chunk_begin(a.m, tasks, t));
        };
        for (int64_t i = first(t); i < first(t + 1); ++i)
            run(i, 0, groups);
    });
}

} // namespace

OperandKind operand_of(const uint8_t *packed) {
    const PackHeader &h = header_of(packed);
    return operand_of(*find_isa(h.isa), h.kind);
}

Source source_of(const LinearArgs &a) {
    const PackHeader &h = header_of(a.packed);
    return matrix_source(*find_isa(h.isa), a.quant, operand_of(a.packed), a.x, a.x_stride, a.m, h.k, h.kr);
}

ImagePixels pixels_of(const ConvArgs &a) {
    const PackHeader &h = header_of(a.packed);
    return {*find_isa(h.isa), a.quant, operand_of(a.packed), a.x, a.channels_last, a.geometry,
            h.groups,         h.kr};
}

Source source_of(const ConvArgs &a) { return pixels_of(a).whole(); }

void dense_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out) {
    const PackHeader &h = header_of(packed);
    const int64_t n_panels = panels(h);
    const Split split = split_gemm(x.m, n_panels, x.m * h.n * h.k * h.taps * h.groups, h.total);
    parallel_tasks(split.tm * split.tn, [&](int64_t task) {
        const int64_t i = task / split.tn, j = task % split.tn;
        const int64_t begin = chunk_begin(x.m, split.tm, i), end = chunk_begin(x.m, split.tm, i + 1);
        const int64_t step = block_rows(end - begin);
        const Pointers pointers(h.taps * kBlockRows);
        float scales[kBlockRows];
        for (int64_t m0 = begin; m0 < end; m0 += step) {
            const int rows = static_cast<int>(std::min(step, end - m0));
            const float *scale = x.row_scales(m0, rows, scales) ? scales : nullptr;
            for (int64_t g = 0; g < h.groups; ++g) {
                x.fill(g, m0, rows, pointers.at, kBlockRows);
                gemm_block(isa, packed, g, pointers.at, kBlockRows, rows, chunk_begin(n_panels, split.tn, j),
                           chunk_begin(n_panels, split.tn, j + 1), out, m0, scale);
            }
        }
    });
}

void sparse_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out) {
    const PackHeader &h = header_of(packed);
    if (sell_preferred(h, x.m))
        return sell_product(isa, packed, x, out);
    const RowBlocks blocks{x.m, isa.narrow_panels};
    const int64_t count = blocks.count(), sparse_groups = div_up(h.n, h.gs);
    const int64_t threads = lists_threads(h, x.m);
    const int64_t panel_bytes = h.taps * h.k * 64;
    const uint32_t *start = reinterpret_cast<const uint32_t *>(packed + h.start_off);
    const auto build = [&](const Source &x, int64_t i, int64_t g, const void **pointers, void *panel,
                           int64_t part = 0, int64_t parts = 1) {
        build_panel(isa, h, x, g, blocks.begin(i), blocks.rows(i), blocks.width(i), pointers, panel, part,
                    parts);
    };
    const auto run = [&](int64_t i, int64_t g, const void *panel, int64_t s0, int64_t s1) {
        float scales[kTileN] = {};
        const float *scale = x.row_scales(blocks.begin(i), blocks.rows(i), scales) ? scales : nullptr;
        run_panel(isa, packed, g, panel, blocks.width(i), s0, s1, out, x.m, blocks.begin(i), blocks.rows(i),
                  scale);
    };
    if (count >= threads || threads == 1) {
        const int64_t tasks = std::min(threads, count);
        // Threads each read their own rows of an image: no join, and lines stay with their core.
        const Source from = tasks > 1 ? x : x.whole();
        const int64_t together = from.together(kTileN) / kTileN;
        parallel_tasks(tasks, [&](int64_t t) {
            const Pointers pointers(h.taps * kTileN);
            void *panel = scratch(Scratch::inner, static_cast<size_t>(panel_bytes));
            const int64_t end = chunk_begin(count, tasks, t + 1);
            for (int64_t i = chunk_begin(count, tasks, t); i < end;) {
                const int64_t next = std::min(end, i + together);
                const Source rows =
                    from.ready(blocks.begin(i), blocks.begin(next - 1) + blocks.rows(next - 1));
                for (; i < next; ++i)
                    for (int64_t g = 0; g < h.groups; ++g) {
                        build(rows, i, g, pointers.at, panel);
                        run(i, g, panel, 0, sparse_groups);
                    }
            }
        });
        return;
    }
    // Fewer row blocks than threads: share each panel, and cut its outputs into parts of equal work.
    const Source whole = x.whole();
    const int64_t parts = div_up(threads, count);
    char *all = static_cast<char *>(scratch(Scratch::inner, static_cast<size_t>(panel_bytes * count)));
    for (int64_t g = 0; g < h.groups; ++g) {
        parallel_tasks(count * parts, [&](int64_t t) {
            const int64_t i = t / parts;
            const Pointers pointers(h.taps * kTileN);
            build(whole, i, g, pointers.at, all + i * panel_bytes, t % parts, parts);
        });
        const uint32_t *from = start + g * sparse_groups;
        parallel_tasks(count * parts, [&](int64_t t) {
            const int64_t i = t / parts, p = t % parts;
            run(i, g, all + i * panel_bytes, balanced(from, sparse_groups, parts, p),
                balanced(from, sparse_groups, parts, p + 1));
        });
    }
}

void product(const uint8_t *packed, const Source &x, const Output &out) {
    const PackHeader &h = header_of(packed);
    if (x.m == 0 || h.n == 0 || h.groups == 0)
        return;
    const Isa &isa = *find_isa(h.isa);
    if (h.kind == PackKind::sparse_f32)
        sparse_f32_product(isa, packed, x, out);
    else if (runs_by_strips(h))
        strips_product(isa, packed, x, out);
    else if (h.kind == PackKind::sparse_i8)
        sparse_product(isa, packed, x, out);
    else
        dense_product(isa, packed, x, out);
}

void product(const LinearArgs &a, const Output &out) {
    const PackHeader &h = header_of(a.packed);
    if (a.m == 0 || h.n == 0)
        return;
    if (runs_by_strips(h))
        return strips_linear(a, out);
    if (h.kind == PackKind::sparse_i8 && !sell_preferred(h, a.m)) {
        constexpr int64_t kMostParts = 4; // that each quantise the same rows
        const int64_t threads = lists_threads(h, a.m);
        // One thread's products may still be worth more than one thread's quantisation.
        if ((threads > 1 || max_threads() == 1) && threads / RowBlocks{a.m}.count() <= kMostParts)
            return own_rows_product(*find_isa(h.isa), a, out, threads);
    }
    product(a.packed, source_of(a), out);
}

} // namespace tautorch
