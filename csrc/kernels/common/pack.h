// Packed weights: one block of bytes that starts with a header, so that it can be checked, run, and
// unpacked again by any build of the library.
#pragma once

#include "kernels/common/isa.h"

namespace tautorch {

enum class PackKind : int32_t {
    dense_i8 = 0,     // panels for dot_i8
    dense_f32 = 1,    // float panels for dot_f32
    dense_w8 = 2,     // int8 panels for float rows (weight-only)
    sparse_i8 = 3,    // quads of kept inputs for sparse_i8
    sparse_f32 = 4,   // kept inputs by blocks, see sparse_f32.h
    depthwise_i8 = 5, // [64 channels][quad of taps][channel][4 taps]
    pairs_i8 = 6,     // 2:4, see pairs.h
    grouped_i8 = 7,   // groups of 4, 8 or 16 channels, see grouped.h
};

struct PackHeader {
    uint32_t magic;
    int32_t version;
    PackKind kind;
    int32_t isa; // Isa::id
    int32_t nr, nr_step, kr;
    int32_t gs;     // outputs per sparse group
    int64_t groups; // convolution groups; n, k, taps are per group
    int64_t n, k, taps;
    int64_t entries;    // sparse: quads (sparse_i8) or entries (sparse_f32) in all
    int64_t blocks;     // sparse: parts of the inputs, each with lists of its own; 0 where there are no lists
    int64_t slots;      // sparse_i8: of the SELL form, see sell.h; 0 where there is none
    int64_t colsum_off; // int32 [groups * n], int8 kinds; dense_w8: float [groups * panels], effective inputs
    int64_t start_off;  // sparse_i8: uint32 [blocks * sparse groups + 1]
    int64_t index_off;  // sparse_i8: uint16
    int64_t data_off;
    int64_t sell_off; // sparse_i8: uint32 [strips + 1], uint16 [slots], then the slots
    int64_t cells;    // sparse_i8: of the form in cells.h; 0 where it is not that
    int64_t cell_outputs, cell_off;
    int64_t total; // bytes
};
static_assert(sizeof(PackHeader) == 8 * 4 + 16 * 8, "no padding: headers are compared as bytes");
constexpr uint32_t kPackMagic = 0x4b505454; // "TTPK"
constexpr int32_t kPackVersion = 4;

inline const PackHeader &header_of(const uint8_t *packed) {
    return *reinterpret_cast<const PackHeader *>(packed);
}

// Inputs of one block of a sparse pack; the last may have fewer.
inline int64_t block_inputs(const PackHeader &h) { return div_up(h.taps * h.k, h.blocks); }

// Of a sparse int8 pack's lists: a panel of 64 rows by 512 inputs (32 KB) stays in L1 while outputs run over
// it, one by 4096 (256 KB) in L2, and lists are longer.
constexpr int64_t kBlockInputs = 512, kWideBlockInputs = 4096;
constexpr int64_t kMaxSparseInputs = 65536; // taps * k of a sparse pack, whose indices have 16 bits

// Whether these sizes are ones that offsets into a pack can be computed from without overflow.
bool sizes_fit(int64_t groups, int64_t n, int64_t k, int64_t taps);
// Whether a header with the right magic number is one that this build makes: its offsets and total follow
// from its sizes. `isa` is the one it names.
bool header_consistent(const Isa &isa, const PackHeader &h);
// Whether the lists of a sparse pack with a consistent header stay within the pack and the inputs; true for
// every other kind.
bool entries_consistent(const uint8_t *packed);

// Weight element (g, n, k, tap) of the canonical tensor is at (g * n_per_group + n) * sn + k * sk + tap * st.
struct WeightStrides {
    int64_t n, k, tap;
};

// Where a depthwise pack keeps tap t of channel c.
inline int64_t depthwise_at(const PackHeader &h, int64_t c, int64_t t) {
    return (c / kTileN * div_up(h.taps, 4) + t / 4) * (4 * kTileN) + c % kTileN * 4 + t % 4;
}

// Header with every offset and the total size filled in.
PackHeader dense_header(const Isa &isa, PackKind kind, int64_t groups, int64_t n, int64_t k, int64_t taps);
// w is float for dense_f32, int8 otherwise (for pairs_i8 one that fits_pairs). out has header.total bytes.
void dense_pack(const PackHeader &h, const void *w, WeightStrides s, uint8_t *out);
void dense_unpack(const uint8_t *packed, void *w, WeightStrides s);

// First byte of a group's panel and its width.
inline int32_t panel_width(const PackHeader &h, int64_t panel) {
    const int64_t left = h.n - panel * h.nr;
    return static_cast<int32_t>(left >= h.nr ? h.nr : round_up(left, h.nr_step));
}
inline int64_t panels(const PackHeader &h) { return div_up(h.n, h.nr); }
inline int64_t group_bytes(const PackHeader &h) {
    return round_up(h.n, h.nr_step) * round_up(h.k, h.kr) * h.taps * (h.kind == PackKind::dense_f32 ? 4 : 1);
}
inline const uint8_t *panel_data(const uint8_t *packed, int64_t group, int64_t panel) {
    const PackHeader &h = header_of(packed);
    const int64_t per_output = round_up(h.k, h.kr) * h.taps * (h.kind == PackKind::dense_f32 ? 4 : 1);
    return packed + h.data_off + group * group_bytes(h) + panel * h.nr * per_output;
}

// Sparse. Entries come grouped: sparse group s (gs consecutive outputs of one convolution group, or what
// is left of it) keeps inputs k (0 .. taps * k_per_tap) listed in counts[s], index, and values
// [entry][gs]. Input order is (tap, k): the caller has reordered convolution weights.
struct SparseEntries {
    int64_t sparse_groups; // in all convolution groups
    const uint32_t *start; // [sparse_groups + 1], in entries
    const uint16_t *index; // [entries]
    const void *values;    // int8 or float [entries][gs]
};
// Whether there is a list for each sparse group and every list's inputs ascend within `inputs`.
bool entries_valid(int gs, int64_t groups, int64_t n, int64_t inputs, const SparseEntries &e);
bool starts_ascend(int64_t lists, const uint32_t *start);
// Which forms a sparse_i8 pack holds; `automatic` keeps what some number of rows runs fastest with. `image`:
// of a convolution, which may also meet planes (NCHW). Lists take and give those as they are, SELL does not;
// it has them besides where both together are at most 1.5 times a dense weight.
enum class SparseForm : int32_t { automatic = 0, lists = 1, sell = 2, both = 3, cells = 4, image = 5 };
// Throws nothing: a form this CPU cannot run is left out.
PackHeader sparse_header(const Isa &isa, PackKind kind, int gs, int64_t groups, int64_t n, int64_t k,
                         int64_t taps, const SparseEntries &e, SparseForm form);
void sparse_pack(const PackHeader &h, const SparseEntries &e, uint8_t *out);
// The entries that a sparse pack was made from; returns how many. start is [sparse_groups + 1]; null pointers
// are left out.
int64_t sparse_unpack(const uint8_t *packed, uint32_t *start, uint16_t *index, void *values);

} // namespace tautorch
