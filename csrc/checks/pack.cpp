#include "checks/pack.h"

#include "kernels/common/grouped.h"
#include "kernels/common/pairs.h"
#include "kernels/common/sell.h"

namespace tautorch {
namespace {

// Whether some int32 sum of a dense pack could overflow although K <= kMaxK.
bool too_low(const PackHeader &h, const int8_t *w, WeightStrides s) {
    const bool integer = h.kind == PackKind::dense_i8 || h.kind == PackKind::depthwise_i8 ||
                         h.kind == PackKind::pairs_i8 || h.kind == PackKind::grouped_i8;
    if (!integer || h.taps * h.k <= kMaxKLowest)
        return false;
    for (int64_t n = 0; n < h.groups * h.n; ++n)
        for (int64_t k = 0; k < h.k; ++k)
            for (int64_t t = 0; t < h.taps; ++t)
                if (w[n * s.n + k * s.k + t * s.tap] == -128)
                    return true;
    return false;
}
static_assert(kMaxSparseInputs <= kMaxKLowest, "sparse packs would need the same check");

} // namespace

const Isa &checked_isa(const char *op, const std::string &kernel) {
    const Isa *isa = find_isa(kernel.c_str());
    if (!isa)
        refuse(std::string(op) + ": unknown kernel '" + kernel + "'");
    if (!isa_supported(*isa))
        refuse(std::string(op) + ": this CPU cannot run kernel '" + kernel + "'");
    return *isa;
}

const PackHeader &checked_header(const char *op, const uint8_t *packed, int64_t bytes) {
    const auto fail = [op](const std::string &what) { refuse(std::string(op) + ": packed weights " + what); };
    if (!packed || bytes < static_cast<int64_t>(sizeof(PackHeader)))
        fail("are shorter than their header");
    if (reinterpret_cast<uintptr_t>(packed) % alignof(PackHeader) != 0)
        fail("must start at a multiple of 8 bytes; clone them");
    const PackHeader &h = header_of(packed);
    if (h.magic != kPackMagic || h.version != kPackVersion)
        fail("have no header of this version; pack the weights again");
    if (h.total > bytes)
        fail("are cut short: header says " + std::to_string(h.total) + " bytes, got " +
             std::to_string(bytes));
    const Isa *isa = find_isa(h.isa);
    if (!isa)
        fail("were made for a kernel this build does not have; pack the weights again");
    if (!isa_supported(*isa))
        fail(std::string("were made for ") + isa->name + ", which this CPU lacks; pack the weights again");
    if (!header_consistent(*isa, h))
        fail("have a header that contradicts itself; pack the weights again");
    return h;
}

const PackHeader &checked_pack(const char *op, const uint8_t *packed, int64_t bytes) {
    const PackHeader &h = checked_header(op, packed, bytes);
    if (h.kind == PackKind::sparse_i8 && h.slots > 0 && h.blocks == 0 && !sell_supported(*find_isa(h.isa)))
        refuse(std::string(op) + ": packed weights need AVX512-VBMI, which this CPU lacks; pack "
                                 "the weights again");
    if (!entries_consistent(packed))
        refuse(std::string(op) + ": packed weights list inputs they do not have; pack the weights again");
    return h;
}

PackHeader checked_dense(const Isa &isa, int64_t kind, int64_t groups, int64_t n, int64_t k, int64_t taps) {
    const auto pack_kind = static_cast<PackKind>(kind);
    const bool depthwise = pack_kind == PackKind::depthwise_i8, pairs = pack_kind == PackKind::pairs_i8,
               grouped = pack_kind == PackKind::grouped_i8;
    if ((!depthwise && !pairs && !grouped && (kind < 0 || pack_kind > PackKind::dense_w8)) ||
        (depthwise && (n != 1 || k != 1)) || (pairs && (groups != 1 || taps != 1)))
        refuse("dense_pack: no dense kind of these sizes");
    if (!sizes_fit(groups, n, k, taps))
        refuse("dense_pack: sizes are out of range");
    if (pack_kind != PackKind::dense_f32 && pack_kind != PackKind::dense_w8 && taps * k > kMaxK)
        refuse("dense_pack: K must be at most " + std::to_string(kMaxK) + " for int32 sums, got " +
               std::to_string(taps * k));
    if (pairs && !(isa.strip && isa.strip->pairs))
        refuse(std::string("dense_pack: kernel '") + isa.name + "' has no 2:4 form");
    if (grouped && !grouped_fits(isa, groups, n, k, taps))
        refuse(std::string("dense_pack: kernel '") + isa.name + "' has no form for groups of these sizes");
    return dense_header(isa, pack_kind, groups, n, k, taps);
}

void check_dense_values(const PackHeader &h, const void *w, WeightStrides s) {
    const int8_t *q = static_cast<const int8_t *>(w);
    if (h.kind == PackKind::pairs_i8 && !fits_pairs(h.n, h.k, q, s))
        refuse("dense_pack: 2:4 keeps at most two of each four inputs");
    if (too_low(h, q, s))
        refuse("dense_pack: weight must be in [-127, 127] where K is above " + std::to_string(kMaxKLowest) +
               ", got -128 with K=" + std::to_string(h.taps * h.k) + "; clamp it to -127 or split the layer");
}

PackHeader checked_sparse(const Isa &isa, int64_t kind, int64_t gs, int64_t groups, int64_t n, int64_t k,
                          int64_t taps, const SparseEntries &e, int64_t form) {
    const auto pack_kind = static_cast<PackKind>(kind);
    if (pack_kind != PackKind::sparse_i8 && pack_kind != PackKind::sparse_f32)
        refuse("sparse_pack: no sparse kind");
    if ((gs != 1 && gs != 4) || !sizes_fit(groups, n, k, taps) || taps * k > kMaxSparseInputs)
        refuse("sparse_pack: sizes are out of range");
    if (!entries_valid(static_cast<int>(gs), groups, n, taps * k, e))
        refuse("sparse_pack: start must ascend from 0, one for each group of outputs, and the "
               "inputs of each group must ascend");
    if (form < 0 || form > static_cast<int>(SparseForm::image))
        refuse("sparse_pack: form must be 0 (automatic), 1 (lists), 2 (SELL), 3 (both), 4 (cells) or 5 "
               "(image), got " +
               std::to_string(form));
    return sparse_header(isa, pack_kind, static_cast<int>(gs), groups, n, k, taps, e,
                         static_cast<SparseForm>(form));
}

const PackHeader &checked_linear(const char *op, const uint8_t *packed, int64_t bytes, int64_t k,
                                 bool sparse) {
    const PackHeader &h = checked_pack(op, packed, bytes);
    const bool fits = sparse ? h.kind != PackKind::depthwise_i8 : h.kind <= PackKind::dense_w8;
    if (h.k != k || h.taps != 1 || h.groups != 1 || !fits)
        refuse(std::string(op) + ": packed weights are of another shape or kind");
    return h;
}

} // namespace tautorch
