#include "kernels/common/cells.h"

#include <algorithm>
#include <cstring>

namespace tautorch {
namespace {

// The sparse groups (4 outputs each) of a strip.
struct Groups {
    int64_t first;
    int64_t count;
    Groups(int64_t n, int64_t outputs, int64_t strip) {
        const int64_t per_group = div_up(n, 4), strips = div_up(n, outputs);
        first = strip / strips * per_group + strip % strips * (outputs / 4);
        count = std::min(outputs / 4, per_group - strip % strips * (outputs / 4));
    }
};

// Cells of each strip of so many outputs, in all; -1 where one is not whole.
int64_t count_cells(int64_t groups, int64_t n, int64_t inputs, const SparseEntries &e, int64_t outputs) {
    int64_t cells = 0;
    for (int64_t s = 0; s < groups * div_up(n, outputs); ++s) {
        const Groups g(n, outputs, s);
        const uint32_t begin = e.start[g.first], size = e.start[g.first + 1] - begin;
        for (int64_t i = 1; i < g.count; ++i)
            if (e.start[g.first + i + 1] - e.start[g.first + i] != size ||
                (size != 0 &&
                 std::memcmp(e.index + begin, e.index + e.start[g.first + i], 2 * size_t{size}) != 0))
                return -1;
        for (uint32_t i = 0; i < size; ++cells) {
            const int64_t from = e.index[begin + i];
            const auto width = static_cast<uint32_t>(std::min<int64_t>(kCellInputs, inputs - from));
            // Inputs ascend: the last is where it must be only if all between are there.
            if (from % kCellInputs != 0 || i + width > size ||
                e.index[begin + i + width - 1] != from + width - 1)
                return -1;
            i += width;
        }
    }
    return cells;
}

} // namespace

CellShape cell_shape(const StripKernel &kernel, int64_t groups, int64_t n, int64_t inputs,
                     const SparseEntries &e) {
    for (const int64_t outputs : {32, 16}) {
        if (kernel.rows(outputs) == 0)
            continue;
        const int64_t cells = count_cells(groups, n, inputs, e, outputs);
        // A strip's missing outputs cost what real ones do.
        if (cells > 0 && (outputs == 16 || 10 * round_up(n, 32) <= 11 * round_up(n, 16)))
            return {cells, outputs};
    }
    return {};
}

void cells_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out) {
    uint32_t *start = reinterpret_cast<uint32_t *>(out + h.cell_off);
    uint16_t *place = reinterpret_cast<uint16_t *>(start + cell_strips(h) + 1);
    int8_t *data = reinterpret_cast<int8_t *>(out + cell_data_off(h));
    const int64_t kr = find_isa(h.isa)->kr;
    const int8_t *values = static_cast<const int8_t *>(e.values);
    int64_t cell = -1;
    for (int64_t s = 0; s < cell_strips(h); ++s) {
        const Groups g(h.n, h.cell_outputs, s);
        start[s] = static_cast<uint32_t>(cell + 1);
        for (uint32_t i = 0; i < e.start[g.first + 1] - e.start[g.first]; ++i) {
            const int64_t input = e.index[e.start[g.first] + i], j = input % kCellInputs;
            if (j == 0)
                place[++cell] = static_cast<uint16_t>(input / kCellInputs);
            int8_t *to = data + cell * cell_bytes(h) + j / kr * (kr * h.cell_outputs) + j % kr;
            for (int64_t b = 0; b < g.count; ++b)
                for (int r = 0; r < 4; ++r)
                    to[kr * (4 * b + r)] = values[4 * (e.start[g.first + b] + int64_t{i}) + r];
        }
    }
    start[cell_strips(h)] = static_cast<uint32_t>(cell + 1);
}

int64_t cells_unpack(const uint8_t *packed, uint32_t *start, uint16_t *index, int8_t *values) {
    const PackHeader &h = header_of(packed);
    const uint32_t *from = cell_start(packed);
    const uint16_t *place = cell_places(packed);
    const int8_t *data = reinterpret_cast<const int8_t *>(packed + cell_data_off(h));
    const int64_t kr = find_isa(h.isa)->kr;
    int64_t to = 0;
    for (int64_t s = 0; s < cell_strips(h); ++s) {
        const Groups g(h.n, h.cell_outputs, s);
        for (int64_t b = 0; b < g.count; ++b) {
            if (start)
                start[g.first + b] = static_cast<uint32_t>(to);
            for (int64_t c = from[s]; c < from[s + 1]; ++c) {
                const int64_t input = int64_t{place[c]} * kCellInputs;
                const int64_t width = std::min<int64_t>(kCellInputs, h.k - input);
                if (index)
                    for (int64_t j = 0; j < width; ++j) {
                        const int8_t *d = data + c * cell_bytes(h) + j / kr * (kr * h.cell_outputs) + j % kr;
                        index[to + j] = static_cast<uint16_t>(input + j);
                        for (int r = 0; r < 4; ++r)
                            values[4 * (to + j) + r] = d[kr * (4 * b + r)];
                    }
                to += width;
            }
        }
    }
    if (start)
        start[h.groups * div_up(h.n, 4)] = static_cast<uint32_t>(to);
    return to;
}

bool cells_consistent(const uint8_t *packed) {
    const PackHeader &h = header_of(packed);
    if (h.cells == 0)
        return true;
    const uint32_t *start = cell_start(packed);
    if (!starts_ascend(cell_strips(h), start) || start[cell_strips(h)] != h.cells)
        return false;
    const uint16_t *place = cell_places(packed);
    for (int64_t s = 0; s < cell_strips(h); ++s)
        for (int64_t i = start[s]; i < start[s + 1]; ++i)
            if (int64_t{place[i]} * kCellInputs >= h.k || (i > start[s] && place[i] <= place[i - 1]))
                return false;
    return true;
}

} // namespace tautorch
