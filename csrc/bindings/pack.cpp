// Packing and unpacking of weights, shared by the operators.
#include "bindings/call.h"
#include "kernels/common/grouped.h"
#include "kernels/common/pairs.h"

namespace tautorch::bindings {
void bind_pack(py::module_ &m) {
    const auto isa_of = [](const std::string &kernel) -> const Isa & { return checked_isa("pack", kernel); };
    m.def("dense_pack_bytes",
          [isa_of](const std::string &kernel, int kind, int64_t groups, int64_t n, int64_t k, int64_t taps) {
              return checked_dense(isa_of(kernel), kind, groups, n, k, taps).total;
          });
    m.def("dense_pack", [isa_of](const std::string &kernel, int kind, int64_t groups, int64_t n, int64_t k,
                                 int64_t taps, int64_t w, int64_t sn, int64_t sk, int64_t st, int64_t out) {
        const PackHeader h = checked_dense(isa_of(kernel), kind, groups, n, k, taps);
        py::gil_scoped_release release;
        check_dense_values(h, at<const void>(w), {sn, sk, st});
        dense_pack(h, at<const void>(w), {sn, sk, st}, at<uint8_t>(out));
    });
    // Whether kernel has a 2:4 form that beats the dense one for n outputs of k inputs.
    m.def("pairs_pay", [isa_of](const std::string &kernel, int64_t n, int64_t k) {
        return pairs_pay(isa_of(kernel), n, k);
    });
    // Whether kernel has a form for groups of n outputs and k inputs.
    m.def("grouped_fits",
          [isa_of](const std::string &kernel, int64_t groups, int64_t n, int64_t k, int64_t taps) {
              return grouped_fits(isa_of(kernel), groups, n, k, taps);
          });
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
    m.def("sparse_pack_bytes", [isa_of](const std::string &kernel, int kind, int gs, int64_t groups,
                                        int64_t n, int64_t k, int64_t taps, int64_t sparse_groups,
                                        int64_t start, int64_t index, int form) {
        const SparseEntries e{sparse_groups, at<const uint32_t>(start), at<const uint16_t>(index), nullptr};
        return checked_sparse(isa_of(kernel), kind, gs, groups, n, k, taps, e, form).total;
    });
    m.def("sparse_pack", [isa_of](const std::string &kernel, int kind, int gs, int64_t groups, int64_t n,
                                  int64_t k, int64_t taps, int64_t sparse_groups, int64_t start,
                                  int64_t index, int64_t values, int form, int64_t out) {
        const SparseEntries e{sparse_groups, at<const uint32_t>(start), at<const uint16_t>(index),
                              at<const void>(values)};
        const PackHeader h = checked_sparse(isa_of(kernel), kind, gs, groups, n, k, taps, e, form);
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
        d["bytes"] = h.total;
        return d;
    });
}

} // namespace tautorch::bindings
