// Packing and unpacking of weights, shared by the operators.
#include "bindings/call.h"
#include "kernels/common/pairs.h"

namespace tautorch::bindings {
namespace {

const Isa &isa_of(const std::string &kernel) {
    const Isa *isa = find_isa(kernel.c_str());
    if (!isa)
        throw py::value_error("pack: unknown kernel '" + kernel + "'");
    if (!isa_supported(*isa))
        throw py::value_error("pack: this CPU cannot run kernel '" + kernel + "'");
    return *isa;
}

PackHeader checked_dense(const std::string &kernel, int kind, int64_t groups, int64_t n, int64_t k,
                         int64_t taps) {
    const auto pack_kind = static_cast<PackKind>(kind);
    const bool depthwise = pack_kind == PackKind::depthwise_i8, pairs = pack_kind == PackKind::pairs_i8;
    if ((!depthwise && !pairs && (kind < 0 || pack_kind > PackKind::dense_w8)) ||
        (depthwise && (n != 1 || k != 1)) || (pairs && (groups != 1 || taps != 1)))
        throw py::value_error("dense_pack: no dense kind of these sizes");
    if (!sizes_fit(groups, n, k, taps))
        throw py::value_error("dense_pack: sizes are out of range");
    const Isa &isa = isa_of(kernel);
    if (pairs && !isa.strip_i8)
        throw py::value_error("dense_pack: kernel '" + kernel + "' has no 2:4 form");
    return dense_header(isa, pack_kind, groups, n, k, taps);
}

// Whether some int32 sum of a dense pack could overflow although K <= kMaxK.
bool too_low(const PackHeader &h, const int8_t *w, WeightStrides s) {
    const bool integer =
        h.kind == PackKind::dense_i8 || h.kind == PackKind::depthwise_i8 || h.kind == PackKind::pairs_i8;
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

PackHeader checked_sparse(const std::string &kernel, int kind, int gs, int64_t groups, int64_t n, int64_t k,
                          int64_t taps, const SparseEntries &e, int form) {
    const auto pack_kind = static_cast<PackKind>(kind);
    if (pack_kind != PackKind::sparse_i8 && pack_kind != PackKind::sparse_f32)
        throw py::value_error("sparse_pack: no sparse kind");
    if ((gs != 1 && gs != 4) || !sizes_fit(groups, n, k, taps) || taps * k > kMaxSparseInputs)
        throw py::value_error("sparse_pack: sizes are out of range");
    if (!entries_valid(gs, groups, n, taps * k, e))
        throw py::value_error("sparse_pack: start must ascend from 0, one for each group of outputs, and the "
                              "inputs of each group must ascend");
    if (form < 0 || form > static_cast<int>(SparseForm::cells))
        throw py::value_error(
            "sparse_pack: form must be 0 (automatic), 1 (lists), 2 (SELL), 3 (both) or 4 (cells), got " +
            std::to_string(form));
    return sparse_header(isa_of(kernel), pack_kind, gs, groups, n, k, taps, e, static_cast<SparseForm>(form));
}

} // namespace

void bind_pack(py::module_ &m) {
    m.def("dense_pack_bytes",
          [](const std::string &kernel, int kind, int64_t groups, int64_t n, int64_t k, int64_t taps) {
              return checked_dense(kernel, kind, groups, n, k, taps).total;
          });
    m.def("dense_pack", [](const std::string &kernel, int kind, int64_t groups, int64_t n, int64_t k,
                           int64_t taps, int64_t w, int64_t sn, int64_t sk, int64_t st, int64_t out) {
        const PackHeader h = checked_dense(kernel, kind, groups, n, k, taps);
        bool pairs = true, low = false;
        {
            py::gil_scoped_release release; // both may read the whole weight
            pairs = h.kind != PackKind::pairs_i8 || fits_pairs(n, k, at<const int8_t>(w), {sn, sk, st});
            low = too_low(h, at<const int8_t>(w), {sn, sk, st});
        }
        if (!pairs)
            throw py::value_error("dense_pack: 2:4 keeps at most two of each four inputs");
        if (low)
            throw py::value_error(
                "dense_pack: weight must be in [-127, 127] where K is above " + std::to_string(kMaxKLowest) +
                ", got -128 with K=" + std::to_string(taps * k) + "; clamp it to -127 or split the layer");
        py::gil_scoped_release release;
        dense_pack(h, at<const void>(w), {sn, sk, st}, at<uint8_t>(out));
    });
    // Whether kernel has a 2:4 form that beats the dense one for n outputs of k inputs.
    m.def("pairs_pay",
          [](const std::string &kernel, int64_t n, int64_t k) { return pairs_pay(isa_of(kernel), n, k); });
    m.def("dense_unpack", [](int64_t packed, int64_t bytes, int64_t w, int64_t sn, int64_t sk, int64_t st) {
        const PackHeader &h = checked_header("unpack", at<const uint8_t>(packed), bytes);
        if (h.kind == PackKind::sparse_i8 || h.kind == PackKind::sparse_f32)
            throw py::value_error("unpack: packed weights are sparse");
        // Where the strides say what shape the caller expects, it must be the pack's.
        if (st == 0 ? h.groups * h.taps != 1 : h.taps * st != sk || h.k * sk != sn)
            throw py::value_error("unpack: packed weights are of another shape");
        py::gil_scoped_release release;
        dense_unpack(at<const uint8_t>(packed), at<void>(w), {sn, sk, st});
    });
    m.def("sparse_pack_bytes", [](const std::string &kernel, int kind, int gs, int64_t groups, int64_t n,
                                  int64_t k, int64_t taps, int64_t sparse_groups, int64_t start,
                                  int64_t index, int form) {
        const SparseEntries e{sparse_groups, at<const uint32_t>(start), at<const uint16_t>(index), nullptr};
        return checked_sparse(kernel, kind, gs, groups, n, k, taps, e, form).total;
    });
    m.def("sparse_pack",
          [](const std::string &kernel, int kind, int gs, int64_t groups, int64_t n, int64_t k, int64_t taps,
             int64_t sparse_groups, int64_t start, int64_t index, int64_t values, int form, int64_t out) {
              const SparseEntries e{sparse_groups, at<const uint32_t>(start), at<const uint16_t>(index),
                                    at<const void>(values)};
              const PackHeader h = checked_sparse(kernel, kind, gs, groups, n, k, taps, e, form);
              py::gil_scoped_release release;
              sparse_pack(h, e, at<uint8_t>(out));
          });
    // Entries of a sparse pack: how many, and (addresses given) uint32 start, uint16 index, values.
    m.def("sparse_unpack", [](int64_t packed, int64_t bytes, int64_t start, int64_t index, int64_t values) {
        const PackHeader &h = checked_header("unpack", at<const uint8_t>(packed), bytes);
        if (!entries_consistent(at<const uint8_t>(packed)))
            throw py::value_error("unpack: packed weights list inputs they do not have");
        if (h.kind != PackKind::sparse_i8 && h.kind != PackKind::sparse_f32)
            throw py::value_error("unpack: packed weights are dense");
        py::gil_scoped_release release;
        return sparse_unpack(at<const uint8_t>(packed), at<uint32_t>(start), at<uint16_t>(index),
                             at<void>(values));
    });
    // What a pack says of itself: kind, kernel, gs, groups, n, k, taps, entries and byte offsets.
    m.def("pack_info", [](int64_t packed, int64_t bytes) {
        const PackHeader &h = checked_header("pack_info", at<const uint8_t>(packed), bytes);
        py::dict d;
        d["kind"] = static_cast<int>(h.kind);
        d["kernel"] = find_isa(h.isa)->name;
        d["gs"] = h.gs;
        d["groups"] = h.groups;
        d["n"] = h.n;
        d["k"] = h.k;
        d["taps"] = h.taps;
        d["entries"] = h.entries;
        d["slots"] = h.slots;
        d["blocks"] = h.blocks;
        d["sell_offset"] = h.sell_off;
        d["cells"] = h.cells;
        d["cell_outputs"] = h.cell_outputs;
        d["cell_offset"] = h.cell_off;
        d["start_offset"] = h.start_off;
        d["index_offset"] = h.index_off;
        return d;
    });
}

} // namespace tautorch::bindings
