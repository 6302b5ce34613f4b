// The form of sparse int8 weights kept in whole blocks: cells of 16 inputs by a strip of 16 or 32 outputs, in
// the dense panel's layout [group of kr inputs][output][kr]. Every byte is a weight, and the product is the
// dense one over the cells that are there.
//
// Layout from cell_off: uint32 [strips + 1], the first cell of each strip; uint16 [cells], which 16 inputs;
// then, on a cache line, the cells.
#pragma once

#include "kernels/common/pack.h"
#include "kernels/common/strip_i8.h"

namespace tautorch {

inline int64_t cell_strips(const PackHeader &h) { return h.groups * div_up(h.n, h.cell_outputs); }
inline int64_t cell_bytes(const PackHeader &h) { return kCellInputs * h.cell_outputs; }
inline const uint32_t *cell_start(const uint8_t *packed) {
    return reinterpret_cast<const uint32_t *>(packed + header_of(packed).cell_off);
}
inline const uint16_t *cell_places(const uint8_t *packed) {
    return reinterpret_cast<const uint16_t *>(cell_start(packed) + cell_strips(header_of(packed)) + 1);
}
inline int64_t cell_data_off(const PackHeader &h) {
    return round_up(h.cell_off + 4 * (cell_strips(h) + 1) + 2 * h.cells, 64);
}

// Whether groups of 4 outputs keep whole cells, and in which; cells 0 where they do not, or keep nothing.
struct CellShape {
    int64_t cells = 0, outputs = 0;
};
CellShape cell_shape(const StripKernel &kernel, int64_t groups, int64_t n, int64_t inputs,
                     const SparseEntries &e);
void cells_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out);
// As sparse_unpack.
int64_t cells_unpack(const uint8_t *packed, uint32_t *start, uint16_t *index, int8_t *values);
bool cells_consistent(const uint8_t *packed);

} // namespace tautorch
