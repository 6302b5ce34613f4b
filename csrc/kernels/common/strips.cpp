#include "kernels/common/strips.h"

#include "core/parallel.h"
#include "kernels/common/cells.h"
#include "kernels/common/pairs.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

constexpr int64_t kPanelBytes = 384 * 1024; // of a block of rows, which every strip reads again from L2

// Tile t of a block of rows, which are dealt out evenly.
struct Tiles {
    int rows, parts;
    Tiles(int rows, int most) : rows(rows), parts((rows + most - 1) / most) {}
    int begin(int t) const { return rows * t / parts; }
    int size(int t) const { return begin(t + 1) - begin(t); }
};

// [inputs / 8][rows][8] of some rows; Arm bytes need no turn.
void interleave8(const void *const *rows, int count, int64_t inputs, uint8_t *out) {
    for (int r = 0; r < count; ++r) {
        const uint8_t *from = static_cast<const uint8_t *>(rows[r]);
        for (int64_t i = 0; i < inputs; i += 8)
            std::memcpy(out + i * count + 8 * r, from + i, 8);
    }
}
// [inputs / 16][rows][16] of some rows, their bytes turned by `flip`.
void interleave16(const void *const *rows, int count, int64_t inputs, uint8_t flip, uint8_t *out) {
    const uint64_t turn = flip * uint64_t{0x0101010101010101};
    for (int r = 0; r < count; ++r) {
        const uint8_t *from = static_cast<const uint8_t *>(rows[r]);
        uint8_t *to = out + r * kCellInputs;
        for (int64_t i = 0; i < inputs; i += kCellInputs, to += count * kCellInputs) {
            uint64_t bytes[2];
            static_assert(sizeof bytes == kCellInputs);
            std::memcpy(bytes, from + i, sizeof bytes);
            bytes[0] ^= turn;
            bytes[1] ^= turn;
            std::memcpy(to, bytes, sizeof bytes);
        }
    }
}

// The strips of one convolution group.
struct Strips {
    const PackHeader &h;
    bool pairs;
    int outputs;
    int64_t count;
    const uint32_t *start = nullptr; // of cells
    const uint16_t *cell = nullptr;
    const int8_t *data;

    Strips(const uint8_t *packed, int64_t group)
        : h(header_of(packed)), pairs(h.kind == PackKind::pairs_i8),
          outputs(pairs ? kPairOutputs : static_cast<int>(h.cell_outputs)), count(div_up(h.n, outputs)) {
        data = reinterpret_cast<const int8_t *>(packed) + (pairs ? h.data_off : cell_data_off(h));
        if (!pairs) {
            start = cell_start(packed) + group * count;
            cell = cell_places(packed);
        }
    }
    // Where part j of n begins: parts of equal work.
    int64_t cut(int64_t n, int64_t j) const {
        if (pairs || j == 0 || j == n)
            return chunk_begin(count, n, j);
        const uint64_t all = start[count] - start[0];
        const auto target =
            static_cast<uint32_t>(start[0] + all * static_cast<uint64_t>(j) / static_cast<uint64_t>(n));
        return std::lower_bound(start, start + count, target) - start;
    }
    void set(StripI8 &s, int64_t strip) const {
        s.outputs = outputs;
        s.cols = static_cast<int>(std::min<int64_t>(outputs, h.n - strip * outputs));
        if (pairs) {
            s.steps = pair_steps(h);
            s.data = data + strip * s.steps * kPairStep;
            return;
        }
        s.steps = int64_t{start[strip + 1]} - start[strip];
        s.cell = cell + start[strip];
        s.data = data + start[strip] * cell_bytes(h);
    }
};

// Strips that a tile of rows takes before the next one does: enough that rows leave in long runs, few enough
// that their weights stay near. One strip down all tiles writes a line or two of each row, rows often a
// multiple of 4 KB apart: 64 rows and more then missed the caches at every line, 2.8 times as slow at worst.
constexpr int64_t kMostStrips = 8;
int64_t strips_together(const Strips &strips) {
    constexpr int64_t kBytes = 192 * 1024;
    return std::clamp<int64_t>(kBytes * strips.h.groups * strips.count / strips.h.total, 1, kMostStrips);
}

// Rows m0 ... of one convolution group, `rows` of them, by strips [s0, s1).
void run_block(const Isa &isa, const Strips &strips, int64_t group, const uint8_t *panel, Tiles tiles,
               int64_t inputs, int64_t s0, int64_t s1, const Output &out, int64_t m0, const float *scale) {
    const Epilogue &e = out.epilogue;
    const int64_t size = size_of(e.out_dtype), together = strips_together(strips);
    const bool rows_leave = isa.strip->to_output && !out.along_m;
    const bool straight =
        rows_leave && (e.activation == Activation::none || e.activation == Activation::relu);
    alignas(64) int32_t sums[16 * 32 * kMostStrips];
    Epilogue plain;
    plain.out_dtype = DType::i32;
    StripI8 s = {};
    s.epilogue = straight ? &e : &plain;
    s.row_bytes = straight ? out.row_stride * size : 4 * strips.outputs * (rows_leave ? together : 1);
    for (int64_t i = 0, all = div_up(s1 - s0, together) * tiles.parts; i < all; ++i) {
        const int64_t from = s0 + i / tiles.parts * together, end = std::min(s1, from + together);
        const int t = static_cast<int>(i % tiles.parts), r0 = tiles.begin(t);
        const int64_t n0 = group * strips.h.n + from * strips.outputs;
        char *to = static_cast<char *>(out.data) + ((m0 + r0) * out.row_stride + n0) * size;
        s.rows = tiles.size(t);
        s.x = panel + r0 * inputs;
        s.row_scale = scale ? scale + r0 : nullptr;
        for (int64_t strip = from; strip < end; ++strip) {
            const int64_t n = (strip - from) * strips.outputs;
            strips.set(s, strip);
            s.n0 = n0 + n;
            s.out = straight ? to + n * size : reinterpret_cast<char *>(sums + (rows_leave ? n : 0));
            isa.strip->run(s);
            if (!rows_leave)
                store_tile(isa, out, sums, strips.outputs, false, m0 + r0, s.rows, s.n0, s.cols, s.row_scale);
        }
        if (rows_leave && !straight)
            isa.epilogue(e, sums, together * strips.outputs, s.rows,
                         static_cast<int>(std::min(end * strips.outputs, strips.h.n) - from * strips.outputs),
                         false, n0, s.row_scale, to, out.row_stride);
    }
}

// operands(m0, rows) gives prepared rows, the first of which is m0 - first; it may be called by several
// threads, for the same rows too.
struct Rows {
    Source x;
    int64_t first;
};
template <class Operands>
void run(const Isa &isa, const uint8_t *packed, int64_t m, Split split, const Operands &operands,
         const Output &out) {
    const PackHeader &h = header_of(packed);
    const int most = isa.strip->rows(Strips(packed, 0).outputs);
    const int64_t inputs = round_up(h.k, kPairInputs);
    const int64_t fit = std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(inputs, 1), most, kBlockRows);
    parallel_tasks(split.tm * split.tn, [&](int64_t task) {
        const int64_t i = task / split.tn, j = task % split.tn;
        const int64_t begin = chunk_begin(m, split.tm, i), all = chunk_begin(m, split.tm, i + 1) - begin;
        const int64_t blocks = div_up(all, fit);
        const void *pointers[kBlockRows];
        float scales[kBlockRows];
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t m0 = begin + chunk_begin(all, blocks, b);
            const int rows = static_cast<int>(begin + chunk_begin(all, blocks, b + 1) - m0);
            const Tiles tiles(rows, most);
            const Rows in = operands(m0, rows);
            const float *scale = in.x.row_scales(m0 - in.first, rows, scales) ? scales : nullptr;
            for (int64_t g = 0; g < h.groups; ++g) {
                const Strips strips(packed, g);
                in.x.fill(g, m0 - in.first, rows, pointers, kBlockRows);
                const uint8_t *panel =
                    static_cast<const uint8_t *>(pointers[0]); // one row is as it should be
                if (rows > 1 || in.x.flip) {
                    uint8_t *to = static_cast<uint8_t *>(
                        scratch(Scratch::inner, static_cast<size_t>(rows * inputs + 16)));
                    for (int t = 0; t < tiles.parts; ++t) {
                        const void *const *from = pointers + tiles.begin(t);
                        uint8_t *tile = to + tiles.begin(t) * inputs;
                        if (isa.strip->unit == 8)
                            interleave8(from, tiles.size(t), inputs, tile);
                        else
                            interleave16(from, tiles.size(t), inputs, in.x.flip, tile);
                    }
                    panel = to;
                }
                run_block(isa, strips, g, panel, tiles, inputs, strips.cut(split.tn, j),
                          strips.cut(split.tn, j + 1), out, m0, scale);
            }
        }
    });
}

// Threads with rows of their own prepare these alone, but read all weights: up to 4 MB of them from 8 rows
// on.
Split split_of(const uint8_t *packed, int64_t m) {
    const PackHeader &h = header_of(packed);
    const Strips strips(packed, 0);
    // 2:4 takes 0.72 of the time of a dense product.
    const int64_t products = strips.pairs ? pair_bytes(h) * 6 / 5 : h.cells * cell_bytes(h);
    const int64_t threads = threads_for(m * products, h.total);
    Split s;
    s.tm = std::max<int64_t>(1, std::min(threads, m / (h.total < int64_t{4} << 20 ? 8 : 24)));
    s.tn = std::max<int64_t>(1, std::min(threads / s.tm, strips.count));
    return s;
}

} // namespace

bool runs_by_strips(const PackHeader &h) { return h.kind == PackKind::pairs_i8 || h.cells > 0; }

void strips_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out) {
    run(isa, packed, x.m, split_of(packed, x.m), [&](int64_t, int) { return Rows{x, 0}; }, out);
}

void strips_linear(const LinearArgs &a, const Output &out) {
    const PackHeader &h = header_of(a.packed);
    const Isa &isa = *find_isa(h.isa);
    const Split split = split_of(a.packed, a.m);
    // Waiting for rows that another core writes and reading them costs 3 to 4 us; a thread quantises some 15
    // elements a nanosecond.
    if (split.tn > 1 && a.m / split.tm * h.k > 60'000)
        return strips_product(isa, a.packed, source_of(a), out);
    run(
        isa, a.packed, a.m, split,
        [&](int64_t m0, int rows) {
            return Rows{block_source(isa, a.quant, operand_of(a.packed), a.x, a.x_stride, m0, rows, h.k, h.kr,
                                     Scratch::rows, Scratch::scales),
                        m0};
        },
        out);
}

} // namespace tautorch
