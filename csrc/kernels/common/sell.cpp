#include "kernels/common/sell.h"

#include "core/arch.h"
#include "core/parallel.h"
#include "kernels/common/sell_avx512vbmi.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

// Lays out strip `strip`: calls slot(offset) for each new slot, then place(lane, j, entry) for what it holds.
// Returns the slots.
template <class S, class P>
int64_t walk(int gs, int64_t n, const SparseEntries &e, int64_t strip, const S &slot, const P &place) {
    const int64_t per_group = div_up(n, gs), strips = div_up(per_group, 16);
    const int64_t first = strip / strips * per_group + strip % strips * 16;
    const int64_t lanes = std::min<int64_t>(16, per_group - strip % strips * 16);
    uint32_t at[16], end[16];
    for (int l = 0; l < 16; ++l) {
        const int64_t g = sell_group(gs, l);
        at[l] = g < lanes ? e.start[first + g] : 0;
        end[l] = g < lanes ? e.start[first + g + 1] : 0;
    }
    for (int64_t count = 0;; ++count) {
        int32_t least = INT32_MAX;
        for (int l = 0; l < 16; ++l)
            if (at[l] < end[l])
                least = std::min<int32_t>(least, e.index[at[l]]);
        if (least == INT32_MAX)
            return count;
        const int32_t offset = least / kSellStep * kSellStep;
        slot(static_cast<uint16_t>(offset));
        for (int l = 0; l < 16; ++l)
            for (int j = 0; j < 4 && at[l] < end[l] && e.index[at[l]] < offset + kSellWindow; ++j, ++at[l])
                place(l, j, at[l]);
    }
}

// Cycles per row of x (SELL) or per panel of 64 or 16 rows (lists).
struct Rates {
    double slot1, window, far_window, slot1_few; // far: the rows' windows do not stay in L1
    double slot4, slot4_few, slot4_one;
    double quad1, quad1_16, quad4, quad4_16, list;
    double sell_output1, sell_output4, lists_output, input; // and per row again
    int64_t l1;
};
// Fitted to Zen 5 and to Zen 4; what else runs 512 bits whole is taken for the former.
constexpr Rates kWholeRates = {0.72, 0.85, 0.85, 1.55, 2.4, 2.6, 4.5, 4.7,      3.5,
                               8.6,  5.0,  15,   0.3,  0.3, 0.4, 0.1, 48 * 1024};
constexpr Rates kHalvesRates = {1.33, 0.5, 0.8, 2.2, 4.75, 4.5,  5.5, 8.0,      6.2,
                                18,   9.0, 15,  0.6, 0.4,  0.65, 0.3, 32 * 1024};
const Rates &rates_here() { return cpu_features().halves_512 ? kHalvesRates : kWholeRates; }

#if defined(__x86_64__)
// Of sums that do not leave from registers: to rows, and to planes, which take whole vectors of rows.
constexpr int kSellTileRows = 24, kSellTileOutputs = 128;
static_assert(kSellTileRows * kSellTileOutputs == kTileRows * kTileN);

// Outputs of strips [s0, s1) of one convolution group, rows m0 ... Groups of 4 leave from registers, 64
// outputs of a row at a time. Single outputs leave through a tile, as stores of 16 outputs to rows far apart
// cost more than that (up to 18 % at 1024 rows); so do planes of outputs and activations with a series.
void sell_block(const Isa &isa, const uint8_t *packed, int64_t group, const void *const *rows, int count,
                uint8_t flip, int64_t s0, int64_t s1, const Output &out, int64_t m0, const float *scale) {
    const PackHeader &h = header_of(packed);
    const int64_t width = 16 * h.gs, size = size_of(out.epilogue.out_dtype);
    const uint32_t *start = sell_start(packed) + group * div_up(div_up(h.n, h.gs), 16);
    const bool direct = h.gs == 4 && direct_output(out);
    const int tile_rows = out.along_m ? kTileRows : kSellTileRows,
              tile_outputs = out.along_m ? kTileN : kSellTileOutputs;
    alignas(64) int32_t acc[kTileRows * kTileN];
    Epilogue plain;
    plain.out_dtype = DType::i32;
    SellI8 p = {};
    p.epilogue = direct ? &out.epilogue : &plain;
    p.row_bytes = direct ? out.row_stride * size : 4 * tile_outputs;
    p.flip = flip;
    p.gs = h.gs;
    const int parts = direct ? 1 : (count + tile_rows - 1) / tile_rows;
    const int64_t together = direct ? 1 : tile_outputs / width;
    for (int64_t t = s0; t < s1; t += together)
        for (int i = 0; i < parts; ++i) {
            const int64_t n0 = t * width, end = std::min(s1, t + together), first = group * h.n + n0;
            const auto row = [&](int part) {
                return out.along_m ? std::min(count, part * tile_rows) : count * part / parts;
            };
            const int r0 = row(i), r1 = row(i + 1);
            const int cols = static_cast<int>(std::min((end - t) * width, h.n - n0));
            p.rows = rows + r0;
            p.count = r1 - r0;
            p.row_scale = scale ? scale + r0 : nullptr;
            char *to = static_cast<char *>(out.data) + ((m0 + r0) * out.row_stride + first) * size;
            for (int64_t s = t; s < end; ++s) {
                p.n0 = group * h.n + s * width;
                p.cols = static_cast<int>(std::min(width, h.n - s * width));
                p.out = direct ? to : reinterpret_cast<char *>(acc + (s - t) * width);
                p.offset = sell_offsets(packed) + start[s];
                p.slots = int64_t{start[s + 1]} - start[s];
                p.data = packed + sell_data_off(h) + start[s] * sell_slot_bytes(h.gs);
                sell_i8_avx512vbmi(p);
            }
            if (direct)
                continue;
            if (out.along_m)
                store_tile(isa, out, acc, tile_outputs, false, m0 + r0, p.count, first, cols, p.row_scale);
            else
                isa.epilogue(out.epilogue, acc, tile_outputs, p.count, cols, false, first, p.row_scale, to,
                             out.row_stride);
        }
}
#endif

} // namespace

bool sell_supported(const Isa &isa) {
#if defined(__x86_64__)
    return (&isa == &isa_avx512vnni || &isa == &isa_amx) && cpu_features().avx512_vbmi;
#else
    (void)isa;
    return false;
#endif
}

int64_t sell_count(int gs, int64_t groups, int64_t n, const SparseEntries &e) {
    int64_t slots = 0;
    for (int64_t s = 0; s < groups * div_up(div_up(n, gs), 16); ++s)
        slots += walk(gs, n, e, s, [](uint16_t) {}, [](int, int, uint32_t) {});
    return slots;
}

void sell_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out) {
    uint32_t *start = reinterpret_cast<uint32_t *>(out + h.sell_off);
    uint16_t *offset = reinterpret_cast<uint16_t *>(start + sell_strips(h) + 1);
    uint8_t *data = out + sell_data_off(h);
    const int8_t *values = static_cast<const int8_t *>(e.values);
    const int64_t bytes = sell_slot_bytes(h.gs);
    int64_t slot = -1;
    for (int64_t s = 0; s < sell_strips(h); ++s) {
        start[s] = static_cast<uint32_t>(slot + 1);
        walk(
            h.gs, h.n, e, s,
            [&](uint16_t o) {
                offset[++slot] = o;
                std::memset(data + slot * bytes, kSellEmpty, 64);
            },
            [&](int lane, int j, uint32_t i) {
                uint8_t *d = data + slot * bytes + 4 * lane + j;
                *d = static_cast<uint8_t>(e.index[i] - offset[slot]);
                for (int g = 0; g < h.gs; ++g)
                    d[64 + 64 * g] = static_cast<uint8_t>(values[int64_t{i} * h.gs + g]);
            });
    }
    start[sell_strips(h)] = static_cast<uint32_t>(slot + 1);
}

int64_t sell_unpack(const uint8_t *packed, uint32_t *start, uint16_t *index, int8_t *values) {
    const PackHeader &h = header_of(packed);
    const uint32_t *from = sell_start(packed);
    const uint16_t *offset = sell_offsets(packed);
    const uint8_t *data = packed + sell_data_off(h);
    const int64_t per_group = div_up(h.n, h.gs), strips = div_up(per_group, 16),
                  bytes = sell_slot_bytes(h.gs);
    int lane_of[16];
    for (int l = 0; l < 16; ++l)
        lane_of[sell_group(h.gs, l)] = l;
    int64_t to = 0;
    for (int64_t s = 0; s < h.groups * per_group; ++s) {
        if (start)
            start[s] = static_cast<uint32_t>(to);
        const int64_t strip = s / per_group * strips + s % per_group / 16;
        const int lane = lane_of[s % per_group % 16];
        for (int64_t i = from[strip]; i < from[strip + 1]; ++i)
            for (int j = 0; j < 4; ++j) {
                const uint8_t *d = data + i * bytes + 4 * lane + j;
                if (*d == kSellEmpty)
                    break; // a lane fills its places from the first
                if (index) {
                    index[to] = static_cast<uint16_t>(offset[i] + *d);
                    for (int g = 0; g < h.gs; ++g)
                        values[to * h.gs + g] = static_cast<int8_t>(d[64 + 64 * g]);
                }
                ++to;
            }
    }
    if (start)
        start[h.groups * per_group] = static_cast<uint32_t>(to);
    return to;
}

bool sell_consistent(const uint8_t *packed) {
    const PackHeader &h = header_of(packed);
    if (h.slots == 0)
        return true;
    const uint32_t *start = sell_start(packed);
    if (!starts_ascend(sell_strips(h), start) || start[sell_strips(h)] != h.slots)
        return false;
    const uint16_t *offset = sell_offsets(packed);
    uint16_t largest = 0;
    for (int64_t i = 0; i < h.slots; ++i)
        largest = offset[i] > largest ? offset[i] : largest;
    return largest < h.taps * h.k;
}

double sell_cost(const PackHeader &h, int64_t m) {
    const Rates &rates = rates_here();
    const auto slots = static_cast<double>(h.slots);
    // Single outputs load a window, often across a cache line, for a few slots. Few rows wait for the latency
    // of their products.
    const double windows =
        std::min(slots, static_cast<double>(sell_strips(h)) * static_cast<double>(div_up(h.k, kSellStep)));
    const double window = kSellRows1 * h.k > rates.l1 ? rates.far_window : rates.window;
    const double single = m < 5 ? rates.slot1_few * slots : rates.slot1 * slots + window * windows;
    const double four = (m == 1 ? rates.slot4_one : m < 5 ? rates.slot4_few : rates.slot4) * slots;
    return static_cast<double>(m) * (h.gs == 4 ? four : single) +
           (h.gs == 4 ? rates.sell_output4 : rates.sell_output1) * static_cast<double>(m * h.n * h.groups);
}

double lists_cost(const PackHeader &h, int64_t m) {
    const Rates &rates = rates_here();
    const auto wide = static_cast<double>(m / 64 + (m % 64 > 32 ? 1 : 0));
    const auto narrow = static_cast<double>(m % 64 > 32 ? 0 : div_up(m % 64, 16));
    const auto quads = static_cast<double>(h.entries);
    const auto lists = static_cast<double>(h.blocks * h.groups * div_up(h.n, h.gs));
    const auto inputs = static_cast<double>(h.taps * h.k * h.groups);
    const auto outputs = static_cast<double>(h.n * h.groups) * rates.lists_output;
    const double per_quad = h.gs == 4 ? rates.quad4 : rates.quad1;
    const double per_quad16 = h.gs == 4 ? rates.quad4_16 : rates.quad1_16;
    return wide * (quads * per_quad + lists * rates.list + 64 * (outputs + rates.input * inputs)) +
           narrow * (quads * per_quad16 + lists * rates.list + 16 * (outputs + 2 * rates.input * inputs));
}

double panel_cost(const PackHeader &h, int64_t rows) {
    return rates_here().input * static_cast<double>(rows * h.taps * h.k * h.groups);
}

bool sell_preferred(const PackHeader &h, int64_t m) {
    if (h.kind != PackKind::sparse_i8 || h.slots == 0 || !sell_supported(*find_isa(h.isa)))
        return false;
    return h.blocks == 0 || sell_cost(h, m) < lists_cost(h, m);
}

void sell_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out) {
#if defined(__x86_64__)
    const PackHeader &h = header_of(packed);
    const int64_t strips = div_up(div_up(h.n, h.gs), 16);
    // Few rows: threads take outputs, each then reads its part of the weights once. Many: rows, 8 % faster at
    // 128 rows of 1024 inputs, 6 % at 64 of 4096.
    const bool small = sell_cost(h, x.m) < 20'000 && h.total < 384 * 1024;
    const int64_t threads = small ? 1 : max_threads();
    const int64_t tn = x.m >= 48 ? 1 : std::min(threads, strips);
    const int64_t tm = std::max<int64_t>(1, std::min(threads / tn, x.m / 6));
    // As with lists (product.cpp): threads with rows of their own read them themselves.
    const int64_t rows_together = tn == 1 && tm > 1 ? x.together(kBlockRows, tm) : 0;
    const Source from = rows_together ? x : x.whole();
    const int64_t together = rows_together ? rows_together : round_up(x.m, kBlockRows);
    parallel_tasks(tm * tn, [&](int64_t task) {
        const int64_t i = task / tn, j = task % tn;
        const int64_t begin = chunk_begin(x.m, tm, i), end = chunk_begin(x.m, tm, i + 1);
        const void *pointers[kBlockRows];
        float scales[kBlockRows];
        Source own;
        for (int64_t m0 = begin; m0 < end; m0 += kBlockRows) {
            const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, end - m0));
            if ((m0 - begin) % together == 0)
                own = from.ready(m0, std::min(end, m0 + together));
            const float *scale = x.row_scales(m0, rows, scales) ? scales : nullptr;
            for (int64_t g = 0; g < h.groups; ++g) {
                // The first strip whose slots start at or after part `part` of the group's.
                const uint32_t *start = sell_start(packed) + g * strips;
                const auto cut = [&](int64_t part) {
                    if (part == tn)
                        return strips;
                    const auto target = static_cast<uint32_t>(start[0] + uint64_t{start[strips] - start[0]} *
                                                                             static_cast<uint64_t>(part) /
                                                                             static_cast<uint64_t>(tn));
                    return std::lower_bound(start, start + strips, target) - start;
                };
                own.fill(g, m0, rows, pointers, kBlockRows);
                sell_block(isa, packed, g, pointers, rows, x.flip, cut(j), cut(j + 1), out, m0, scale);
            }
        }
    });
#else
    (void)isa, (void)packed, (void)x, (void)out;
#endif
}

} // namespace tautorch
