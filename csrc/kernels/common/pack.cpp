#include "kernels/common/pack.h"

#include "core/memory.h"

#include <cstring>

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
    h.kr = kind == PackKind::dense_i8 ? isa.kr : 1;
    h.gs = 1;
    h.groups = groups;
    h.n = n;
    h.k = k;
    h.taps = taps;
    h.colsum_off = round_up(sizeof(PackHeader), 64);
    return h;
}

bool has_colsum(PackKind k) {
    return k == PackKind::dense_i8 || k == PackKind::sparse_i8 || k == PackKind::depthwise_i8;
}

int64_t after_colsum(const PackHeader &h) {
    return round_up(h.colsum_off + (has_colsum(h.kind) ? 4 * h.groups * h.n : 0), 64);
}

// Calls f(g, n, k, tap, position in the data in elements) for every weight, in packed order.
template <class F> void each_weight(const PackHeader &h, const F &f) {
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

// Header of a sparse pack with this many quads or entries.
PackHeader sparse_layout(const Isa &isa, PackKind kind, int gs, int64_t groups, int64_t n, int64_t k,
                         int64_t taps, int64_t entries) {
    PackHeader h = base_header(isa, kind, groups, n, k, taps);
    h.gs = gs;
    h.entries = entries;
    h.start_off = after_colsum(h);
    h.index_off = round_up(h.start_off + 4 * (groups * div_up(n, gs) + 1), 64);
    h.data_off = round_up(h.index_off + 2 * entries * (kind == PackKind::sparse_i8 ? 4 : 1), 64);
    h.total = round_up(h.data_off + entries * gs * 4, 64);
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
    case PackKind::sparse_f32:
        if ((h.gs != 1 && h.gs != 4) || h.taps * h.k > kMaxSparseInputs || h.entries < 0 ||
            h.entries > int64_t{1} << 32)
            return false;
        made = sparse_layout(isa, h.kind, h.gs, h.groups, h.n, h.k, h.taps, h.entries);
        break;
    case PackKind::depthwise_i8:
        if (h.n != 1 || h.k != 1)
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
    if (h.kind != PackKind::sparse_i8 && h.kind != PackKind::sparse_f32)
        return true;
    const uint32_t *start = reinterpret_cast<const uint32_t *>(packed + h.start_off);
    const int64_t sparse_groups = h.groups * div_up(h.n, h.gs), inputs = h.taps * h.k;
    if (!starts_ascend(h.gs, h.groups, h.n, {sparse_groups, start, nullptr, nullptr}) ||
        start[sparse_groups] != h.entries)
        return false;
    const uint16_t *index = reinterpret_cast<const uint16_t *>(packed + h.index_off);
    const int64_t n = h.entries * (h.kind == PackKind::sparse_i8 ? 4 : 1);
    uint16_t largest = 0; // no early exit: this way the loop is a vector one
    for (int64_t i = 0; i < n; ++i)
        largest = index[i] > largest ? index[i] : largest;
    return n == 0 || largest < inputs;
}

PackHeader dense_header(const Isa &isa, PackKind kind, int64_t groups, int64_t n, int64_t k, int64_t taps) {
    PackHeader h = base_header(isa, kind, groups, n, k, taps);
    h.data_off = after_colsum(h);
    if (kind == PackKind::depthwise_i8)
        h.total = h.data_off + groups * taps;
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
                out[h.data_off + t * h.groups + g] = static_cast<uint8_t>(v);
                colsum[g] += v;
            }
        return;
    }
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
}

void dense_unpack(const uint8_t *packed, void *w, WeightStrides s) {
    const PackHeader &h = header_of(packed);
    int8_t *wi = static_cast<int8_t *>(w);
    if (h.kind == PackKind::depthwise_i8) {
        for (int64_t g = 0; g < h.groups; ++g)
            for (int64_t t = 0; t < h.taps; ++t)
                wi[g * s.n + t * s.tap] = static_cast<int8_t>(packed[h.data_off + t * h.groups + g]);
        return;
    }
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

PackHeader sparse_header(const Isa &isa, PackKind kind, int gs, int64_t groups, int64_t n, int64_t k,
                         int64_t taps, const SparseEntries &e) {
    int64_t entries = 0;
    for (int64_t s = 0; s < e.sparse_groups; ++s) {
        const int64_t c = e.start[s + 1] - e.start[s];
        entries += kind == PackKind::sparse_i8 ? div_up(c, 4) : c;
    }
    return sparse_layout(isa, kind, gs, groups, n, k, taps, entries);
}

bool starts_ascend(int gs, int64_t groups, int64_t n, const SparseEntries &e) {
    if (e.sparse_groups != groups * div_up(n, gs) || e.start[0] != 0)
        return false;
    for (int64_t s = 0; s < e.sparse_groups; ++s)
        if (e.start[s + 1] < e.start[s])
            return false;
    return true;
}

void sparse_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out) {
    advise_huge_pages(out, static_cast<size_t>(h.total));
    std::memset(out, 0, static_cast<size_t>(h.total));
    std::memcpy(out, &h, sizeof h);
    uint32_t *start = reinterpret_cast<uint32_t *>(out + h.start_off);
    uint16_t *index = reinterpret_cast<uint16_t *>(out + h.index_off);
    const int64_t per_group = div_up(h.n, h.gs);
    if (h.kind == PackKind::sparse_f32) {
        std::memcpy(start, e.start, static_cast<size_t>(4 * (e.sparse_groups + 1)));
        if (h.entries > 0) { // nothing may lie at a null address, which memcpy must not be given
            std::memcpy(index, e.index, static_cast<size_t>(2 * h.entries));
            std::memcpy(out + h.data_off, e.values, static_cast<size_t>(4 * h.entries * h.gs));
        }
        return;
    }
    int32_t *colsum = reinterpret_cast<int32_t *>(out + h.colsum_off);
    int8_t *data = reinterpret_cast<int8_t *>(out + h.data_off);
    const int8_t *values = static_cast<const int8_t *>(e.values);
    uint32_t quad = 0;
    for (int64_t s = 0; s < e.sparse_groups; ++s) {
        start[s] = quad;
        const int64_t first_output = s / per_group * h.n + s % per_group * h.gs;
        const int64_t outputs = h.n - s % per_group * h.gs; // of this group, may be under gs
        for (int64_t i = e.start[s], j = 0; i < e.start[s + 1]; ++i, ++j) {
            const int64_t q = quad + j / 4;
            index[4 * q + j % 4] = e.index[i];
            for (int r = 0; r < h.gs; ++r) {
                const int8_t v = values[i * h.gs + r];
                data[(q * h.gs + r) * 4 + j % 4] = v;
                if (r < outputs)
                    colsum[first_output + r] += v;
            }
        }
        quad += static_cast<uint32_t>(div_up(e.start[s + 1] - e.start[s], 4));
    }
    start[e.sparse_groups] = quad;
}

} // namespace tautorch
