#include "kernels/common/pack.h"

#include "core/arch.h"
#include "core/memory.h"
#include "kernels/common/cells.h"
#include "kernels/common/grouped.h"
#include "kernels/common/pairs.h"
#include "kernels/common/product_w8.h"
#include "kernels/common/sell.h"
#include "kernels/common/sparse_f32.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace tautorch {
namespace {

PackHeader base_header(const Isa &isa, PackKind kind, int64_t groups, int64_t n, int64_t k, int64_t taps) {
    PackHeader h;
    std::memset(&h, 0, sizeof h);
    h.magic = kPackMagic;
    h.version = kPackVersion;
    h.kind = kind;
    h.isa = isa.id;
    h.nr = isa.nr;
    h.nr_step = isa.nr_step;
    h.kr = kind == PackKind::dense_i8 || (kind == PackKind::dense_w8 && isa.widen) ? isa.kr : 1;
    h.gs = 1;
    h.groups = groups;
    h.n = n;
    h.k = k;
    h.taps = taps;
    h.colsum_off = round_up(sizeof(PackHeader), 64);
    return h;
}

bool has_colsum(PackKind k) {
    return k == PackKind::dense_i8 || k == PackKind::sparse_i8 || k == PackKind::depthwise_i8 ||
           k == PackKind::pairs_i8 || k == PackKind::grouped_i8;
}

int64_t after_colsum(const PackHeader &h) {
    const int64_t sums = has_colsum(h.kind)             ? h.groups * h.n
                         : h.kind == PackKind::dense_w8 ? h.groups * panels(h)
                                                        : 0;
    return round_up(h.colsum_off + 4 * sums, 64);
}

// (|w|_1 / |w|_2)^2 of that column of a panel [inputs / kr][width][kr] where it is least: how many of the
// inputs weigh. 0 for more inputs than digits are made of, whose squares could be too many for 32 bits.
float effective_inputs(const int8_t *panel, int64_t inputs, int width, int kr) {
    if (inputs > kMostDigitInputs)
        return 0.0f;
    int32_t sum[kTileN] = {}, squares[kTileN] = {};
    double least = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < inputs; ++k)
        for (int n = 0; n < width; ++n) {
            const int32_t w = panel[(k - k % kr) * width + n * kr + k % kr];
            sum[n] += std::abs(w);
            squares[n] += w * w;
        }
    for (int n = 0; n < width; ++n)
        if (sum[n] > 0)
            least = std::min(least, static_cast<double>(sum[n]) * sum[n] / squares[n]);
    return static_cast<float>(least);
}

// Calls f(g, n, k, tap, position in the data in elements) for every weight, in packed order but for
// grouped_i8.
template <class F> void each_weight(const PackHeader &h, const F &f) {
    if (h.kind == PackKind::grouped_i8) {
        for (int64_t g = 0; g < h.groups; ++g)
            for (int64_t n = 0; n < h.n; ++n)
                for (int64_t k = 0; k < h.k; ++k)
                    for (int64_t t = 0; t < h.taps; ++t)
                        f(g, n, k, t, grouped_at(h, g, n, k, t));
        return;
    }
    int64_t at = 0;
    for (int64_t g = 0; g < h.groups; ++g)
        for (int64_t p = 0; p < panels(h); ++p) {
            const int64_t n0 = p * h.nr, width = panel_width(h, p);
            for (int64_t t = 0; t < h.taps; ++t)
                for (int64_t k = 0; k < h.k; k += h.kr)
                    for (int64_t n = n0; n < n0 + width; ++n)
                        for (int64_t i = k; i < k + h.kr; ++i, ++at)
                            if (n < h.n && i < h.k)
                                f(g, n, i, t, at);
        }
}

int64_t sparse_groups_of(const PackHeader &h) { return h.groups * div_up(h.n, h.gs); }
// sparse_i8 keeps the 8-fold of an input's place in its block: addresses of rows of 64 and of 16 bytes are 8
// and 2 times that, which costs no instruction.
static_assert(kWideBlockInputs * 8 <= 65536);
uint16_t stored_input(const PackHeader &h, int64_t block, int64_t input) {
    return static_cast<uint16_t>((input - block * block_inputs(h)) * 8);
}
int64_t input_of(const PackHeader &h, int64_t block, uint16_t stored) {
    return block * block_inputs(h) + stored / 8;
}

int64_t input_blocks(int64_t inputs, int64_t length) { return std::max<int64_t>(1, div_up(inputs, length)); }

// Inputs of a block of lists that keep this share of them. Every list costs its start and its sums' way to
// memory and back, and fills a quad; the products of dense lists would rather have their panel in L1. Where
// 512 bits take two halves, the panel in L2 is fast enough for groups of 4.
int64_t list_inputs(int gs, double kept) {
    const double most = gs == 1 ? 0.07 : cpu_features().halves_512 ? 1.0 : 0.2;
    return kept <= most ? kWideBlockInputs : kBlockInputs;
}

// Header of a sparse pack with so many quads or entries in so many blocks, and so many slots.
PackHeader sparse_layout(const Isa &isa, PackKind kind, int gs, int64_t groups, int64_t n, int64_t k,
                         int64_t taps, int64_t blocks, int64_t entries, int64_t slots) {
    PackHeader h = base_header(isa, kind, groups, n, k, taps);
    h.gs = gs;
    h.entries = entries;
    h.start_off = after_colsum(h);
    if (kind == PackKind::sparse_f32) {
        sparse_f32_layout(h);
        return h;
    }
    h.blocks = blocks;
    h.slots = slots;
    h.index_off = round_up(h.start_off + (blocks > 0 ? 4 * (blocks * groups * div_up(n, gs) + 1) : 0), 64);
    h.data_off = round_up(h.index_off + 8 * entries, 64);
    h.sell_off = round_up(h.data_off + entries * gs * 4, 64);
    h.total = h.sell_off;
    if (slots > 0)
        h.total = sell_data_off(h) + slots * sell_slot_bytes(gs);
    h.total = round_up(h.total, 64);
    return h;
}

// Header of a pack of cells alone.
PackHeader cells_layout(const Isa &isa, int64_t groups, int64_t n, int64_t k, int64_t cells,
                        int64_t outputs) {
    PackHeader h = base_header(isa, PackKind::sparse_i8, groups, n, k, 1);
    h.gs = 4;
    h.cells = cells;
    h.cell_outputs = outputs;
    h.cell_off = after_colsum(h);
    h.total = round_up(cell_data_off(h) + cells * cell_bytes(h), 64);
    return h;
}

} // namespace

bool sizes_fit(int64_t groups, int64_t n, int64_t k, int64_t taps) {
    if (groups < 1 || n < 0 || k < 0 || taps < 1)
        return false;
    // In floating point, where nothing overflows; panels and groups of inputs round n and k up by less than
    // 64 and 4, an element has at most 4 bytes.
    const double outputs = static_cast<double>(groups) * (static_cast<double>(n) + 64);
    return 4 * outputs * (static_cast<double>(k) + 4) * static_cast<double>(taps) < 0x1p60;
}

bool header_consistent(const Isa &isa, const PackHeader &h) {
    if (!sizes_fit(h.groups, h.n, h.k, h.taps))
        return false;
    PackHeader made;
    switch (h.kind) {
    case PackKind::sparse_i8:
        if (h.cells != 0) {
            if (!isa.strip || isa.strip->rows(h.cell_outputs) == 0 || h.cells < 0 ||
                h.cells > int64_t{1} << 32 || h.k > kMaxSparseInputs)
                return false;
            made = cells_layout(isa, h.groups, h.n, h.k, h.cells, h.cell_outputs);
            break;
        }
        [[fallthrough]];
    case PackKind::sparse_f32:
        if ((h.gs != 1 && h.gs != 4) || h.taps * h.k > kMaxSparseInputs || h.entries < 0 ||
            h.entries > int64_t{1} << 32 || h.slots < 0 || h.slots > int64_t{1} << 32)
            return false;
        if (h.kind == PackKind::sparse_i8 && h.blocks != input_blocks(h.taps * h.k, kBlockInputs) &&
            h.blocks != input_blocks(h.taps * h.k, kWideBlockInputs) &&
            (h.blocks != 0 || h.entries != 0 || h.slots == 0))
            return false;
        if (h.slots > 0 && (h.kind != PackKind::sparse_i8 || h.taps != 1))
            return false;
        made = sparse_layout(isa, h.kind, h.gs, h.groups, h.n, h.k, h.taps, h.blocks, h.entries, h.slots);
        break;
    case PackKind::depthwise_i8:
        if (h.n != 1 || h.k != 1)
            return false;
        [[fallthrough]];
    case PackKind::pairs_i8:
        if (h.kind == PackKind::pairs_i8 && (!isa.strip || !isa.strip->pairs || h.groups != 1 || h.taps != 1))
            return false;
        [[fallthrough]];
    case PackKind::grouped_i8:
        if (h.kind == PackKind::grouped_i8 && !grouped_fits(isa, h.groups, h.n, h.k, h.taps))
            return false;
        [[fallthrough]];
    case PackKind::dense_i8:
    case PackKind::dense_f32:
    case PackKind::dense_w8:
        made = dense_header(isa, h.kind, h.groups, h.n, h.k, h.taps);
        break;
    default:
        return false;
    }
    return std::memcmp(&made, &h, sizeof h) == 0;
}

bool entries_consistent(const uint8_t *packed) {
    const PackHeader &h = header_of(packed);
    if (h.kind == PackKind::sparse_f32)
        return sparse_f32_consistent(packed);
    if (h.kind != PackKind::sparse_i8)
        return true;
    if (h.cells > 0)
        return cells_consistent(packed);
    if (!sell_consistent(packed))
        return false;
    if (h.blocks == 0)
        return true;
    const uint32_t *start = reinterpret_cast<const uint32_t *>(packed + h.start_off);
    const int64_t lists = h.blocks * h.groups * div_up(h.n, h.gs), inputs = h.taps * h.k;
    if (!starts_ascend(lists, start) || start[lists] != h.entries)
        return false;
    const uint16_t *index = reinterpret_cast<const uint16_t *>(packed + h.index_off);
    const int64_t per_block = lists / h.blocks;
    for (int64_t b = 0; b < h.blocks; ++b) {
        const int64_t first = int64_t{4} * start[b * per_block],
                      last = int64_t{4} * start[(b + 1) * per_block];
        uint16_t largest = 0, bits = 0; // no early exit: this way the loop is a vector one
        for (int64_t i = first; i < last; ++i) {
            largest = index[i] > largest ? index[i] : largest;
            bits |= index[i];
        }
        if (bits % 8 != 0)
            return false;
        if (last > first && input_of(h, b, largest) >= std::min(inputs, (b + 1) * block_inputs(h)))
            return false;
    }
    return true;
}

PackHeader dense_header(const Isa &isa, PackKind kind, int64_t groups, int64_t n, int64_t k, int64_t taps) {
    PackHeader h = base_header(isa, kind, groups, n, k, taps);
    h.data_off = after_colsum(h);
    if (kind == PackKind::depthwise_i8)
        h.total = h.data_off + round_up(groups, kTileN) * round_up(taps, 4);
    else if (kind == PackKind::pairs_i8)
        h.total = h.data_off + pair_bytes(h);
    else if (kind == PackKind::grouped_i8)
        h.total = h.data_off + grouped_blocks(h) * grouped_bytes(h);
    else
        h.total = h.data_off + groups * group_bytes(h);
    // Vector loads of a last, partial group may look past the data.
    h.total = round_up(h.total, 64) + 64;
    return h;
}

void dense_pack(const PackHeader &h, const void *w, WeightStrides s, uint8_t *out) {
    advise_huge_pages(out, static_cast<size_t>(h.total));
    std::memset(out, 0, static_cast<size_t>(h.total));
    std::memcpy(out, &h, sizeof h);
    int32_t *colsum = reinterpret_cast<int32_t *>(out + h.colsum_off);
    const int8_t *wi = static_cast<const int8_t *>(w);
    if (h.kind == PackKind::depthwise_i8) {
        for (int64_t g = 0; g < h.groups; ++g)
            for (int64_t t = 0; t < h.taps; ++t) {
                const int8_t v = wi[g * s.n + t * s.tap];
                out[h.data_off + depthwise_at(h, g, t)] = static_cast<uint8_t>(v);
                colsum[g] += v;
            }
        return;
    }
    if (h.kind == PackKind::pairs_i8)
        return pairs_pack(h, wi, s, out);
    const auto at = [&](int64_t g, int64_t n, int64_t k, int64_t t) {
        return (g * h.n + n) * s.n + k * s.k + t * s.tap;
    };
    if (h.kind == PackKind::dense_f32) {
        const float *wf = static_cast<const float *>(w);
        float *data = reinterpret_cast<float *>(out + h.data_off);
        each_weight(
            h, [&](int64_t g, int64_t n, int64_t k, int64_t t, int64_t p) { data[p] = wf[at(g, n, k, t)]; });
        return;
    }
    int8_t *data = reinterpret_cast<int8_t *>(out + h.data_off);
    const bool sums = has_colsum(h.kind);
    each_weight(h, [&](int64_t g, int64_t n, int64_t k, int64_t t, int64_t p) {
        const int8_t v = wi[at(g, n, k, t)];
        data[p] = v;
        if (sums)
            colsum[g * h.n + n] += v;
    });
    float *effective = reinterpret_cast<float *>(out + h.colsum_off);
    for (int64_t i = 0; h.kind == PackKind::dense_w8 && i < h.groups * panels(h); ++i) {
        const int64_t group = i / panels(h), p = i % panels(h);
        effective[i] = effective_inputs(reinterpret_cast<const int8_t *>(panel_data(out, group, p)),
                                        h.taps * round_up(h.k, h.kr), panel_width(h, p), h.kr);
    }
}

void dense_unpack(const uint8_t *packed, void *w, WeightStrides s) {
    const PackHeader &h = header_of(packed);
    int8_t *wi = static_cast<int8_t *>(w);
    if (h.kind == PackKind::depthwise_i8) {
        for (int64_t g = 0; g < h.groups; ++g)
            for (int64_t t = 0; t < h.taps; ++t)
                wi[g * s.n + t * s.tap] = static_cast<int8_t>(packed[h.data_off + depthwise_at(h, g, t)]);
        return;
    }
    if (h.kind == PackKind::pairs_i8)
        return pairs_unpack(packed, wi, s);
    const auto at = [&](int64_t g, int64_t n, int64_t k, int64_t t) {
        return (g * h.n + n) * s.n + k * s.k + t * s.tap;
    };
    if (h.kind == PackKind::dense_f32) {
        const float *data = reinterpret_cast<const float *>(packed + h.data_off);
        float *wf = static_cast<float *>(w);
        each_weight(
            h, [&](int64_t g, int64_t n, int64_t k, int64_t t, int64_t p) { wf[at(g, n, k, t)] = data[p]; });
        return;
    }
    const int8_t *data = reinterpret_cast<const int8_t *>(packed + h.data_off);
    each_weight(h,
                [&](int64_t g, int64_t n, int64_t k, int64_t t, int64_t p) { wi[at(g, n, k, t)] = data[p]; });
}

bool starts_ascend(int64_t lists, const uint32_t *start) {
    if (start[0] != 0)
        return false;
    for (int64_t s = 0; s < lists; ++s)
        if (start[s + 1] < start[s])
            return false;
    return true;
}

bool entries_valid(int gs, int64_t groups, int64_t n, int64_t inputs, const SparseEntries &e) {
    if (e.sparse_groups != groups * div_up(n, gs) || !starts_ascend(e.sparse_groups, e.start))
        return false;
    for (int64_t s = 0; s < e.sparse_groups; ++s)
        for (uint32_t i = e.start[s]; i < e.start[s + 1]; ++i)
            if (e.index[i] >= inputs || (i > e.start[s] && e.index[i] <= e.index[i - 1]))
                return false;
    return true;
}

PackHeader sparse_header(const Isa &isa, PackKind kind, int gs, int64_t groups, int64_t n, int64_t k,
                         int64_t taps, const SparseEntries &e, SparseForm form) {
    if (kind == PackKind::sparse_f32)
        return sparse_layout(isa, kind, gs, groups, n, k, taps, 0, e.start[e.sparse_groups], 0);
    // Whole blocks run at the dense rate for any number of rows, and one row reads no byte but weights.
    const bool choose = form == SparseForm::automatic || form == SparseForm::image;
    if ((choose || form == SparseForm::cells) && gs == 4 && taps == 1 && isa.strip) {
        const CellShape shape = cell_shape(*isa.strip, groups, n, k, e);
        if (shape.cells > 0 && (form == SparseForm::cells || 2 * n >= shape.outputs))
            return cells_layout(isa, groups, n, k, shape.cells, shape.outputs);
    }
    const double kept = static_cast<double>(e.start[e.sparse_groups]) /
                        static_cast<double>(std::max<int64_t>(1, e.sparse_groups * taps * k));
    const int64_t blocks = input_blocks(taps * k, list_inputs(gs, kept));
    const int64_t length = block_inputs(sparse_layout(isa, kind, gs, groups, n, k, taps, blocks, 0, 0));
    int64_t entries = 0;
    for (int64_t s = 0; s < e.sparse_groups; ++s)
        for (uint32_t i = e.start[s]; i < e.start[s + 1];) {
            const int64_t end = (e.index[i] / length + 1) * length;
            const uint32_t first = i;
            while (i < e.start[s + 1] && e.index[i] < end)
                ++i;
            entries += div_up(i - first, 4);
        }
    const auto layout = [&](int64_t with_blocks, int64_t slots) {
        return sparse_layout(isa, kind, gs, groups, n, k, taps, with_blocks, with_blocks ? entries : 0,
                             slots);
    };
    // Without a slot (nothing kept), lists say it all.
    const bool sell = taps == 1 && form != SparseForm::lists && sell_supported(isa);
    const int64_t slots = sell ? sell_count(gs, groups, n, e) : 0;
    const PackHeader both = layout(blocks, slots);
    if (slots == 0 || form == SparseForm::lists || form == SparseForm::cells)
        return layout(blocks, 0);
    if (form == SparseForm::both)
        return both;
    constexpr int64_t kMany = 256; // rows: where lists win at all, they win here
    const bool lists_pay = lists_cost(both, kMany) < 0.95 * sell_cost(both, kMany);
    const bool planes =
        form == SparseForm::image && isa.quantize_panel && groups == 1 && 2 * both.total <= 3 * n * k;
    return choose && (lists_pay || planes) ? both : layout(0, slots);
}

void sparse_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out) {
    advise_huge_pages(out, static_cast<size_t>(h.total));
    std::memset(out, 0, static_cast<size_t>(h.total));
    std::memcpy(out, &h, sizeof h);
    if (h.kind == PackKind::sparse_f32) {
        sparse_f32_pack(h, e, out);
        return;
    }
    uint32_t *start = reinterpret_cast<uint32_t *>(out + h.start_off);
    uint16_t *index = reinterpret_cast<uint16_t *>(out + h.index_off);
    int32_t *colsum = reinterpret_cast<int32_t *>(out + h.colsum_off);
    int8_t *data = reinterpret_cast<int8_t *>(out + h.data_off);
    const int8_t *values = static_cast<const int8_t *>(e.values);
    const int64_t per_group = div_up(h.n, h.gs);
    if (h.slots > 0)
        sell_pack(h, e, out);
    if (h.cells > 0)
        cells_pack(h, e, out);
    for (int64_t s = 0; s < e.sparse_groups; ++s) {
        const int64_t first = s / per_group * h.n + s % per_group * h.gs;
        const int64_t outputs = std::min<int64_t>(h.gs, h.n - s % per_group * h.gs);
        for (int64_t i = e.start[s]; i < e.start[s + 1]; ++i)
            for (int64_t r = 0; r < outputs; ++r)
                colsum[first + r] += values[i * h.gs + r];
    }
    if (h.blocks == 0)
        return;
    const int64_t length = block_inputs(h);
    uint32_t q = 0; // quads so far
    // Lists go block by block; `at` is where each group's own list has got to.
    std::vector<uint32_t> at(e.start, e.start + e.sparse_groups);
    for (int64_t b = 0; b < h.blocks; ++b)
        for (int64_t s = 0; s < e.sparse_groups; ++s) {
            start[b * e.sparse_groups + s] = q;
            uint32_t &i = at[static_cast<size_t>(s)];
            int64_t j = 0; // in the list
            for (; i < e.start[s + 1] && e.index[i] < (b + 1) * length; ++i, ++j) {
                const int64_t to = q + j / 4;
                index[4 * to + j % 4] = stored_input(h, b, e.index[i]);
                for (int r = 0; r < h.gs; ++r)
                    data[(to * h.gs + r) * 4 + j % 4] = values[int64_t{i} * h.gs + r];
            }
            q += static_cast<uint32_t>(div_up(j, 4));
            // What fills up a quad repeats the last input, with weight 0: no new input, so no entry.
            for (; j % 4 != 0; ++j)
                index[4 * (q - 1) + j % 4] = index[4 * (q - 1) + j % 4 - 1];
        }
    start[h.blocks * e.sparse_groups] = q;
}

int64_t sparse_unpack(const uint8_t *packed, uint32_t *start, uint16_t *index, void *values) {
    const PackHeader &h = header_of(packed);
    if (h.kind == PackKind::sparse_f32)
        return sparse_f32_unpack(packed, start, index, static_cast<float *>(values));
    if (h.cells > 0)
        return cells_unpack(packed, start, index, static_cast<int8_t *>(values));
    if (h.blocks == 0)
        return sell_unpack(packed, start, index, static_cast<int8_t *>(values));
    const uint32_t *from = reinterpret_cast<const uint32_t *>(packed + h.start_off);
    const uint16_t *inputs = reinterpret_cast<const uint16_t *>(packed + h.index_off);
    const int8_t *data = reinterpret_cast<const int8_t *>(packed + h.data_off);
    const int64_t lists = sparse_groups_of(h);
    int64_t to = 0;
    for (int64_t s = 0; s < lists; ++s) {
        if (start)
            start[s] = static_cast<uint32_t>(to);
        for (int64_t b = 0; b < h.blocks; ++b) {
            int64_t last = -1;
            for (int64_t i = int64_t{4} * from[b * lists + s]; i < int64_t{4} * from[b * lists + s + 1];
                 ++i) {
                const int64_t input = input_of(h, b, inputs[i]);
                if (input <= last)
                    continue;
                last = input;
                if (index) {
                    index[to] = static_cast<uint16_t>(input);
                    for (int r = 0; r < h.gs; ++r)
                        static_cast<int8_t *>(values)[to * h.gs + r] = data[(i / 4 * h.gs + r) * 4 + i % 4];
                }
                ++to;
            }
        }
    }
    if (start)
        start[lists] = static_cast<uint32_t>(to);
    return to;
}

} // namespace tautorch
