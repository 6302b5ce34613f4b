#include "kernels/common/sparse_f32.h"

#include "core/parallel.h"
#include "kernels/common/panel_store.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

struct Lists {
    const uint32_t *start;
    const uint16_t *segments;
    const uint8_t *index;
    const float *values;
};
Lists lists_of(const uint8_t *packed, const F32Blocks &b) {
    const PackHeader &h = header_of(packed);
    return {reinterpret_cast<const uint32_t *>(packed + h.start_off),
            reinterpret_cast<const uint16_t *>(packed + b.segment_off), packed + h.index_off,
            reinterpret_cast<const float *>(packed + h.data_off)};
}

// Calls f(sparse group, first entry, entries, first input) for every segment with entries.
template <class F> void each_segment(const PackHeader &h, const F32Blocks &b, const Lists &l, const F &f) {
    for (int64_t g = 0; g < h.groups; ++g)
        for (int64_t t = 0; t < b.tiles; ++t)
            for (int64_t step = 0; step < b.steps; ++step) {
                const uint16_t *segment = l.segments + b.first_segment(g, t, step);
                int64_t entry = l.start[b.block(g, t, step)];
                for (int64_t i = 0; i < b.groups_in(t); ++i) {
                    const int64_t local = segment[i] & ((1 << b.shift) - 1), n = segment[i] >> b.shift;
                    f(g * b.per_group + t * b.tile + local, entry, n, step * b.width);
                    entry += n;
                }
            }
}

} // namespace

F32Blocks::F32Blocks(const PackHeader &h) {
    per_group = div_up(h.n, h.gs);
    tile = kTileOutputs / h.gs;
    tiles = div_up(per_group, tile);
    inputs = h.taps * h.k;
    // Four outputs share each load of x, 16 products for 8 loads: L2 keeps up, and long blocks read and write
    // the accumulators less often. A single output has 4 products for 5 loads and wants x in L1.
    // Where few inputs are kept, the accumulators cost more than L1's misses.
    const bool rare = h.entries * 12 < h.groups * h.n * inputs;
    const int64_t most = h.gs == 4 ? 512 : rare ? 256 : 128;
    steps = div_up(inputs, most);
    width = steps == 0 ? most : div_up(inputs, steps);
    blocks = h.groups * tiles * steps;
    segments = h.groups * per_group * steps;
    shift = h.gs == 1 ? 7 : 5;
    index_bytes = h.gs == 1 ? 1 : 2;
    segment_off = round_up(h.start_off + 4 * (blocks + 1), 64);
}

void sparse_f32_layout(PackHeader &h) {
    const F32Blocks b(h);
    h.blocks = std::max<int64_t>(1, b.steps);
    h.index_off = round_up(b.segment_off + 2 * b.segments, 64);
    h.data_off = round_up(h.index_off + b.index_bytes * h.entries, 64);
    h.total = round_up(h.data_off + 4 * h.gs * h.entries, 64);
}

void sparse_f32_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out) {
    const F32Blocks b(h);
    uint32_t *start = reinterpret_cast<uint32_t *>(out + h.start_off);
    uint16_t *segments = reinterpret_cast<uint16_t *>(out + b.segment_off);
    uint8_t *index8 = out + h.index_off;
    uint16_t *index16 = reinterpret_cast<uint16_t *>(index8);
    float *data = reinterpret_cast<float *>(out + h.data_off);
    const float *values = static_cast<const float *>(e.values);
    int64_t at = 0;
    for (int64_t g = 0; g < h.groups; ++g)
        for (int64_t t = 0; t < b.tiles; ++t) {
            const int64_t s0 = g * b.per_group + t * b.tile, n = b.groups_in(t);
            uint32_t next[kTileOutputs]; // entries of each group that are packed
            for (int64_t i = 0; i < n; ++i)
                next[i] = e.start[s0 + i];
            for (int64_t step = 0; step < b.steps; ++step) {
                const int64_t end = (step + 1) * b.width;
                uint32_t order[kTileOutputs]; // count << 7 | group
                for (int64_t i = 0; i < n; ++i) {
                    const uint32_t last = e.start[s0 + i + 1];
                    uint32_t j = next[i];
                    while (j < last && e.index[j] < end)
                        ++j;
                    order[i] = (j - next[i]) << 7 | static_cast<uint32_t>(i);
                }
                std::sort(order, order + n);
                start[b.block(g, t, step)] = static_cast<uint32_t>(at);
                uint16_t *segment = segments + b.first_segment(g, t, step);
                for (int64_t i = 0; i < n; ++i) {
                    const uint32_t from = order[i] % 128, count = order[i] / 128;
                    segment[i] = static_cast<uint16_t>(count << b.shift | from);
                    for (uint32_t j = 0; j < count; ++j, ++at) {
                        const auto k = static_cast<uint16_t>(e.index[next[from]] - step * b.width);
                        if (b.index_bytes == 1)
                            index8[at] = static_cast<uint8_t>(k);
                        else
                            index16[at] = k;
                        std::memcpy(data + at * h.gs, values + int64_t{next[from]} * h.gs,
                                    sizeof(float) * static_cast<size_t>(h.gs));
                        ++next[from];
                    }
                }
            }
        }
    start[b.blocks] = static_cast<uint32_t>(at);
}

int64_t sparse_f32_unpack(const uint8_t *packed, uint32_t *start, uint16_t *index, float *values) {
    const PackHeader &h = header_of(packed);
    if (!start)
        return h.entries;
    const F32Blocks b(h);
    const Lists l = lists_of(packed, b);
    // Blocks of inputs ascend, so a group's entries come in order; start[s + 1] is where its next one goes.
    const int64_t sparse_groups = h.groups * b.per_group;
    std::fill_n(start, sparse_groups + 1, 0u);
    each_segment(h, b, l, [&](int64_t s, int64_t, int64_t n, int64_t) {
        if (s + 2 <= sparse_groups)
            start[s + 2] += static_cast<uint32_t>(n);
    });
    for (int64_t s = 2; s <= sparse_groups; ++s)
        start[s] += start[s - 1];
    each_segment(h, b, l, [&](int64_t s, int64_t entry, int64_t n, int64_t first) {
        for (int64_t i = entry; i < entry + n; ++i) {
            const int64_t to = start[s + 1]++;
            uint16_t k = l.index[i];
            if (b.index_bytes == 2)
                k = reinterpret_cast<const uint16_t *>(l.index)[i];
            index[to] = static_cast<uint16_t>(k + first);
            std::memcpy(values + to * h.gs, l.values + i * h.gs, sizeof(float) * static_cast<size_t>(h.gs));
        }
    });
    return h.entries;
}

bool sparse_f32_consistent(const uint8_t *packed) {
    const PackHeader &h = header_of(packed);
    const F32Blocks b(h);
    const Lists l = lists_of(packed, b);
    if (l.start[0] != 0 || l.start[b.blocks] != h.entries)
        return false;
    for (int64_t g = 0; g < h.groups; ++g)
        for (int64_t t = 0; t < b.tiles; ++t)
            for (int64_t step = 0; step < b.steps; ++step) {
                const int64_t i = b.block(g, t, step), n = b.groups_in(t);
                const int64_t begin = l.start[i], end = l.start[i + 1];
                if (end < begin || end > h.entries)
                    return false;
                const uint16_t *segment = l.segments + b.first_segment(g, t, step);
                int64_t counted = 0;
                bool seen[kTileOutputs] = {};
                for (int64_t s = 0; s < n; ++s) {
                    const int64_t local = segment[s] & ((1 << b.shift) - 1);
                    if (local >= n || seen[local])
                        return false;
                    seen[local] = true;
                    counted += segment[s] >> b.shift;
                }
                if (counted != end - begin)
                    return false;
                uint16_t largest = 0; // no early exit: this way the loops are vector ones
                if (b.index_bytes == 1)
                    for (int64_t j = begin; j < end; ++j)
                        largest = std::max<uint16_t>(largest, l.index[j]);
                else
                    for (int64_t j = begin; j < end; ++j)
                        largest = std::max(largest, reinterpret_cast<const uint16_t *>(l.index)[j]);
                if (end > begin && largest >= std::min(b.width, b.inputs - step * b.width))
                    return false;
            }
    return true;
}

namespace {

// Row blocks of 64, then one of 64, 32, 16 or 4 for what is left: an unfilled lane costs as much as a used
// one, and a panel of 4 rows costs as much an entry as one of 16.
struct RowBlocks {
    int64_t m;
    int64_t count() const { return div_up(m, 64); }
    int64_t begin(int64_t i) const { return i * 64; }
    int rows(int64_t i) const { return static_cast<int>(std::min<int64_t>(64, m - i * 64)); }
    int width(int64_t i) const {
        const int n = rows(i);
        return n > 32 ? 64 : n > 16 ? 32 : n > 4 ? 16 : 4;
    }
};

struct Job {
    const Isa &isa;
    const uint8_t *packed;
    const Source &x;
    const Output &out;
    const F32Blocks b;
    const Lists lists;
    RowBlocks rows;

    const PackHeader &h() const { return header_of(packed); }

    const void **pointers() const {
        return static_cast<const void **>(
            scratch(Scratch::panel, sizeof(void *) * static_cast<size_t>(h().taps * kTileN)));
    }
    float *panel() const {
        return static_cast<float *>(scratch(Scratch::inner, static_cast<size_t>(4 * 64 * b.inputs)));
    }

    // panel[k][w]. Rows past the end repeat the last one.
    void build(int64_t i, const void *const *pointers, float *panel) const {
        const int n = rows.rows(i), w = rows.width(i);
        for (int64_t tap = 0; tap < h().taps; ++tap) {
            const uint32_t *from[kTileN];
            for (int r = 0; r < w; ++r)
                from[r] = static_cast<const uint32_t *>(pointers[tap * kTileN + std::min(r, n - 1)]);
            isa.transpose_32(from, w, h().k, reinterpret_cast<uint32_t *>(panel) + tap * h().k * w, w);
        }
    }

    // Tiles [t0, t1) of convolution group g over row block i.
    void run(int64_t i, int64_t g, const float *panel, int64_t t0, int64_t t1) const {
        const int n = rows.rows(i), w = rows.width(i), gs = h().gs;
        alignas(64) float acc[kTileOutputs * kTileN];
        const PanelStore store(isa, out, acc, w);
        for (int64_t t = t0; t < t1; ++t) {
            const int64_t groups = b.groups_in(t);
            std::memset(acc, 0, sizeof(float) * static_cast<size_t>(groups * gs * w));
            for (int64_t step = 0; step < b.steps; ++step) {
                const int64_t entry = lists.start[b.block(g, t, step)];
                isa.sparse_f32(gs, w, panel + step * b.width * w,
                               lists.segments + b.first_segment(g, t, step), static_cast<int>(groups),
                               lists.index + entry * b.index_bytes, lists.values + entry * gs, acc);
            }
            const int64_t outputs = std::min(groups * gs, h().n - t * kTileOutputs);
            const int64_t n0 = g * h().n + t * kTileOutputs;
            if (w >= 16) {
                store(rows.begin(i), n, n0, static_cast<int>(outputs), nullptr);
                continue;
            }
            for (int64_t c = 0; c < outputs; c += kTileN)
                store_tile(isa, out, acc + c * w, w, true, rows.begin(i), n, n0 + c,
                           static_cast<int>(std::min<int64_t>(kTileN, outputs - c)), nullptr);
        }
    }

    // First tile of group g whose entries start at or after part i of n of the group's.
    int64_t balanced(int64_t g, int64_t n, int64_t i) const {
        if (i == n || b.steps == 0)
            return b.tiles * i / n;
        const auto at = [&](int64_t t) { return int64_t{lists.start[b.block(g, t, 0)]}; };
        const int64_t target = at(0) + (at(b.tiles) - at(0)) * i / n;
        int64_t t = 0;
        while (t < b.tiles && at(t) < target)
            ++t;
        return t;
    }
};

} // namespace

void sparse_f32_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out) {
    const F32Blocks blocks(header_of(packed));
    const Job job = {isa, packed, x, out, blocks, lists_of(packed, blocks), {x.m}};
    const PackHeader &h = job.h();
    const int64_t work = h.entries * h.gs * round_up(x.m, 16);
    const int64_t threads = work < 1'000'000 ? 1 : max_threads();
    const int64_t count = job.rows.count() * h.groups;
    // Panels are dealt out where that is even; otherwise every thread makes all of them and takes a share of
    // their tiles. Building them together takes longer: a line that the other core has just written takes
    // some 20 ns (16 x 4096 x 1024 at 90 %: 129 us shared).
    const bool alike = (x.m - 1) % 64 >= 32; // all panels have 64 rows
    const bool deal = threads == 1 || count >= 4 * threads || (alike ? count : h.groups) % threads == 0;
    const int64_t tasks = deal ? std::min(threads, count) : threads;
    parallel_tasks(tasks, [&](int64_t task) {
        const void **pointers = job.pointers();
        float *panel = job.panel();
        const int64_t begin = deal ? chunk_begin(count, tasks, task) : 0;
        const int64_t end = deal ? chunk_begin(count, tasks, task + 1) : count;
        for (int64_t j = begin; j < end; ++j) {
            const int64_t i = j / h.groups, g = j % h.groups;
            const int64_t t0 = deal ? 0 : job.balanced(g, tasks, task);
            const int64_t t1 = deal ? blocks.tiles : job.balanced(g, tasks, task + 1);
            if (t0 == t1)
                continue;
            x.fill(g, job.rows.begin(i), job.rows.rows(i), pointers, kTileN);
            job.build(i, pointers, panel);
            job.run(i, g, panel, t0, t1);
        }
    });
}

} // namespace tautorch
