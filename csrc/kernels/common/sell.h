// The SELL form of a sparse int8 weight: 16 lanes, four kept inputs each, per slot.
//
// A strip is 16 sparse groups (16 outputs, or 64 in groups of 4). A slot names, for each lane, up to four
// inputs within 64 of the slot's offset (a multiple of 32), and holds their weights: vpermb gathers the bytes
// of a row of x by the 64 places, vpdpbusd multiplies. x stays row-major, any number of rows runs, and one
// row reads every weight once. A lane that is done with the slowest lane's inputs goes on to those ahead: at
// 50, 80 and 95 % zeros the slots hold 1.07, 1.22 and 2.0 times the kept weights (random masks; aligned
// windows without this: 1.27, 1.58, 2.55).
#pragma once

#include "kernels/common/source.h"

namespace tautorch {

constexpr int kSellWindow = 64, kSellStep = 32;
constexpr uint8_t kSellEmpty =
    0x80; // a place that holds no input; vpermb reads its low bits, the weight is 0

// Whether this CPU and kernel run it.
bool sell_supported(const Isa &isa);

inline int64_t sell_slot_bytes(int gs) { return 64 + 64 * gs; }
inline int64_t sell_strips(const PackHeader &h) { return h.groups * div_up(div_up(h.n, h.gs), 16); }
// Which sparse group of its strip a lane holds. In groups of 4, so that unpacking the four accumulators gives
// outputs in order.
inline int sell_group(int gs, int lane) { return gs == 4 ? 4 * (lane % 4) + lane / 4 : lane; }

inline const uint32_t *sell_start(const uint8_t *packed) {
    return reinterpret_cast<const uint32_t *>(packed + header_of(packed).sell_off);
}
inline const uint16_t *sell_offsets(const uint8_t *packed) {
    return reinterpret_cast<const uint16_t *>(sell_start(packed) + sell_strips(header_of(packed)) + 1);
}
inline int64_t sell_data_off(const PackHeader &h) {
    return round_up(h.sell_off + 4 * (sell_strips(h) + 1) + 2 * h.slots, 64);
}

int64_t sell_count(int gs, int64_t groups, int64_t n, const SparseEntries &e);
void sell_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out);
// As sparse_unpack.
int64_t sell_unpack(const uint8_t *packed, uint32_t *start, uint16_t *index, int8_t *values);
bool sell_consistent(const uint8_t *packed);

// Cycles, roughly, of m rows in either form; see docs/perf-notes.md for the measurements behind them.
double sell_cost(const PackHeader &h, int64_t m);
double lists_cost(const PackHeader &h, int64_t m);
// Of the latter, what its panels cost: `rows` rows of blocks of 64.
double panel_cost(const PackHeader &h, int64_t rows);
// Whether a pack runs m rows in the SELL form.
bool sell_preferred(const PackHeader &h, int64_t m);

void sell_product(const Isa &isa, const uint8_t *packed, const Source &x, const Output &out);

} // namespace tautorch
