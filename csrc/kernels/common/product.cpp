#include "kernels/common/product.h"

#include "core/parallel.h"
#include "kernels/common/panel_store.h"
#include "kernels/common/sell.h"
#include "kernels/common/sparse_f32.h"
#include "kernels/common/strips.h"

#include <algorithm>
#include <utility>

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

// Row blocks of 64, then of 16 where 32 rows or fewer are left, then one of 4 where the kernel takes it: an
// unfilled lane costs as much as a used one.
struct RowBlocks {
    int64_t m;
    bool narrow = false;
    int64_t wide() const { return m / 64 + (m % 64 > 32 ? 1 : 0); }
    int64_t count() const { return wide() + (m % 64 > 32 ? 0 : div_up(m % 64, 16)); }
    int width(int64_t i) const { return i < wide() ? 64 : narrow && m - begin(i) <= 4 ? 4 : 16; }
    int64_t begin(int64_t i) const { return i < wide() ? i * 64 : wide() * 64 + (i - wide()) * 16; }
    int rows(int64_t i) const { return static_cast<int>(std::min<int64_t>(width(i), m - begin(i))); }
};

// Blocks shared out to threads by cost. Where they do not come out even, two threads take a part of the
// outputs of one block each, and both make its panel: 192 rows on two threads are 1.5 blocks each.
class Shares {
  public:
    struct Cut {
        int64_t block;
        double part; // of the block's outputs, in [0, 1)
    };
    Shares(const PackHeader &h, const RowBlocks &blocks, int64_t threads)
        : blocks_(blocks), threads_(threads), wide_(lists_cost(h, 64)), narrow_(lists_cost(h, 16)),
          panel_(panel_cost(h, 64)) {}
    // Where thread t's share begins and that of the one before ends.
    Cut cut(int64_t t) const {
        if (t == threads_)
            return {blocks_.count(), 0.0};
        const auto wide = static_cast<double>(blocks_.wide()),
                   narrow = static_cast<double>(blocks_.count() - blocks_.wide());
        const double share = (wide * wide_ + narrow * narrow_) / static_cast<double>(threads_);
        const double at = share * static_cast<double>(t), rest = at - wide * wide_;
        const double cost = rest < 0.0 ? wide_ : narrow_;
        const double place = rest < 0.0 ? at / wide_ : wide + rest / narrow_;
        Cut c = {static_cast<int64_t>(place), 0.0};
        c.part = place - static_cast<double>(c.block);
        // Split into a part m and the rest, a block takes max(m, 1 - m) of its panel's cost more than a
        // share; whole, min(m, 1 - m) of its own. A gain of less than 2 % was a loss at times.
        const double panel = rest < 0.0 ? panel_ : panel_ / 2, least = std::min(c.part, 1.0 - c.part);
        if (least * cost - (1.0 - least) * panel < 0.02 * share)
            c = {c.block + (c.part < 0.5 ? 0 : 1), 0.0};
        return c;
    }
    // Calls f(i, from, to) for thread t's parts of its blocks.
    template <class F> void each(int64_t t, const F &f) const {
        const Cut from = cut(t), to = cut(t + 1);
        for (int64_t i = from.block; i < to.block + (to.part > 0.0 ? 1 : 0); ++i)
            f(i, i == from.block ? from.part : 0.0, i == to.block ? to.part : 1.0);
    }
    // Blocks [first, second) of thread t.
    std::pair<int64_t, int64_t> blocks(int64_t t) const {
        const Cut to = cut(t + 1);
        return {cut(t).block, to.block + (to.part > 0.0 ? 1 : 0)};
    }

  private:
    const RowBlocks &blocks_;
    int64_t threads_;
    double wide_, narrow_, panel_;
};

int64_t lists_threads(const PackHeader &h, int64_t m) {
    // A panel of 16 rows costs the same with one of them used.
    const int64_t work = h.entries * h.gs * 4 * round_up(m, 16);
    return work < 1'000'000 ? 1 : max_threads();
}

// Rows of a matrix: who multiplies a block of them quantises it, too, also where several threads take a part
// of its outputs each. Lines that one core wrote and another reads cost as much, and at times far more: 64 x
// 4096 x 1024, 95 % zeros, 80 us like this, 83 or 200 us with a common panel.
void own_rows_product(const Isa &isa, const LinearArgs &a, const Output &out, int64_t threads) {
    const PackHeader &h = header_of(a.packed);
    const RowBlocks blocks{a.m, isa.narrow_panels};
    const int64_t groups = div_up(h.n, h.gs);
    const Shares shares(h, blocks, threads);
    const uint32_t *start = reinterpret_cast<const uint32_t *>(a.packed + h.start_off);
    parallel_tasks(threads, [&](int64_t t) {
        shares.each(t, [&](int64_t i, double from, double to) {
            const int rows = blocks.rows(i), w = blocks.width(i);
            const Source x = block_source(isa, a.quant, operand_of(a.packed), a.x, a.x_stride,
                                          blocks.begin(i), rows, h.k, h.kr, Scratch::rows, Scratch::scales);
            const Pointers pointers(h.taps * kTileN);
            void *panel = scratch(Scratch::inner, static_cast<size_t>(h.k * w));
            build_panel(isa, h, x, 0, 0, rows, w, pointers.at, panel);
            float scales[kTileN] = {};
            const float *scale = x.row_scales(0, rows, scales) ? scales : nullptr;
            lists_panel(isa, a.packed, 0, panel, w, group_at(start, groups, from),
                        group_at(start, groups, to), out, a.m, blocks.begin(i), rows, scale);
        });
    });
}

} // namespace

int64_t group_at(const uint32_t *start, int64_t groups, double part) {
    if (part >= 1.0)
        return groups;
    const auto target =
        start[0] + static_cast<uint32_t>(part * static_cast<double>(start[groups] - start[0]));
    return std::lower_bound(start, start + groups, target) - start;
}

void lists_panel(const Isa &isa, const uint8_t *packed, int64_t group, const void *panel, int w, int64_t s0,
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
    const bool codes = scaled && isa.sparse_i8_codes && e.out_dtype == DType::i8 && !out.along_m &&
                       (relu || e.activation == Activation::none);
    const PanelStore store(isa, rest, acc, w, scaled && !out.along_m);
    const int64_t size = size_of(e.out_dtype), row_bytes = out.row_stride * size;
    // Zen 4, 4x1, float out: fetching the lines of a tile while its lists run takes 10 to 25 % off where the
    // output is 8 MB and more, 5 to 20 % at 2 MB where lists are long, and adds 3 % there where they are
    // short.
    const int64_t quads = h.entries / std::max<int64_t>(1, h.blocks * lists);
    const bool fetch = !out.along_m && (m * row_bytes > int64_t{3} << 20 ||
                                        (m * row_bytes > int64_t{1} << 20 && quads >= 128));
    const int64_t step = kTileOutputs / h.gs;
    for (int64_t s = s0; s < s1; s += step) {
        const int64_t end = std::min(s1, s + step), n0 = group * h.n + s * h.gs;
        const int cols = static_cast<int>(std::min((end - s) * h.gs, h.n - s * h.gs));
        bool left = false; // the tile has, from registers
        for (int64_t b = 0; b < h.blocks; ++b) {
            const uint8_t *x = static_cast<const uint8_t *>(panel) + b * block_inputs(h) * w;
            const int8_t *values = reinterpret_cast<const int8_t *>(data);
            if (!scaled || b + 1 < h.blocks) {
                isa.sparse_i8(h.gs, w, x, start + b * lists, index, values, s, end, b > 0, acc);
                continue;
            }
            char *to = static_cast<char *>(out.data) + m0 * row_bytes + n0 * size;
            const SparseScales scales = {scale,
                                         e.w_scale ? e.w_scale + n0 : nullptr,
                                         e.bias && !e.addend ? e.bias + n0 : nullptr,
                                         e.correction ? e.colsum + n0 : nullptr,
                                         e.correction,
                                         relu,
                                         cols,
                                         to,
                                         row_bytes,
                                         cols * size,
                                         fetch ? rows : 0,
                                         !out.along_m};
            left = codes && isa.sparse_i8_codes(x, start + b * lists, index, values, s, end,
                                                b > 0 ? acc : nullptr, scales, {&e, rows, to, row_bytes});
            if (!left)
                isa.sparse_i8_scaled(x, start + b * lists, index, values, s, end, b > 0, acc, scales);
        }
        if (left)
            continue;
        for (int c = 0; w < 16 && c < cols; c += kTileN)
            store_tile(isa, rest, acc + c * w, w, true, m0, rows, n0 + c, std::min(kTileN, cols - c), scale);
        if (w >= 16)
            store(m0, rows, n0, cols, scaled ? nullptr : scale);
    }
}

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
        lists_panel(isa, packed, g, panel, blocks.width(i), s0, s1, out, x.m, blocks.begin(i), blocks.rows(i),
                    scale);
    };
    if (count >= threads) {
        // Threads each read their own rows of an image: no join, and lines stay with their core.
        const int64_t rows_together = threads > 1 ? x.together(kTileN, threads) : 0;
        const Source from = rows_together ? x : x.whole();
        const int64_t together = rows_together ? rows_together / kTileN : count;
        const Shares shares(h, blocks, threads);
        parallel_tasks(threads, [&](int64_t t) {
            const Pointers pointers(h.taps * kTileN);
            void *panel = scratch(Scratch::inner, static_cast<size_t>(panel_bytes));
            const int64_t first = shares.blocks(t).first, end = shares.blocks(t).second;
            Source rows;
            shares.each(t, [&](int64_t i, double part, double to) {
                if ((i - first) % together == 0) {
                    const int64_t last = std::min(end, i + together) - 1;
                    rows = from.ready(blocks.begin(i), blocks.begin(last) + blocks.rows(last));
                }
                for (int64_t g = 0; g < h.groups; ++g) {
                    const uint32_t *lists = start + g * sparse_groups;
                    build(rows, i, g, pointers.at, panel);
                    run(i, g, panel, group_at(lists, sparse_groups, part),
                        group_at(lists, sparse_groups, to));
                }
            });
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
            const auto at = [&](int64_t p) {
                return group_at(from, sparse_groups, static_cast<double>(p) / static_cast<double>(parts));
            };
            run(i, g, all + i * panel_bytes, at(p), at(p + 1));
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
