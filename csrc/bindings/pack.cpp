// Packing and unpacking of weights, shared by the operators.
#include "bindings/call.h"

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

} // namespace

void bind_pack(py::module_ &m) {
    m.def("dense_pack_bytes",
          [](const std::string &kernel, int kind, int64_t groups, int64_t n, int64_t k, int64_t taps) {
              return dense_header(isa_of(kernel), static_cast<PackKind>(kind), groups, n, k, taps).total;
          });
    m.def("dense_pack", [](const std::string &kernel, int kind, int64_t groups, int64_t n, int64_t k,
                           int64_t taps, int64_t w, int64_t sn, int64_t sk, int64_t st, int64_t out) {
        const PackHeader h = dense_header(isa_of(kernel), static_cast<PackKind>(kind), groups, n, k, taps);
        py::gil_scoped_release release;
        dense_pack(h, at<const void>(w), {sn, sk, st}, at<uint8_t>(out));
    });
    m.def("dense_unpack", [](int64_t packed, int64_t bytes, int64_t w, int64_t sn, int64_t sk, int64_t st) {
        checked_header("unpack", at<const uint8_t>(packed), bytes);
        py::gil_scoped_release release;
        dense_unpack(at<const uint8_t>(packed), at<void>(w), {sn, sk, st});
    });
    m.def("sparse_pack_bytes", [](const std::string &kernel, int kind, int gs, int64_t groups, int64_t n,
                                  int64_t k, int64_t taps, int64_t sparse_groups, int64_t start) {
        const SparseEntries e{sparse_groups, at<const uint32_t>(start), nullptr, nullptr};
        return sparse_header(isa_of(kernel), static_cast<PackKind>(kind), gs, groups, n, k, taps, e).total;
    });
    m.def("sparse_pack",
          [](const std::string &kernel, int kind, int gs, int64_t groups, int64_t n, int64_t k, int64_t taps,
             int64_t sparse_groups, int64_t start, int64_t index, int64_t values, int64_t out) {
              const SparseEntries e{sparse_groups, at<const uint32_t>(start), at<const uint16_t>(index),
                                    at<const void>(values)};
              const PackHeader h =
                  sparse_header(isa_of(kernel), static_cast<PackKind>(kind), gs, groups, n, k, taps, e);
              py::gil_scoped_release release;
              sparse_pack(h, e, at<uint8_t>(out));
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
        d["start_offset"] = h.start_off;
        d["index_offset"] = h.index_off;
        d["data_offset"] = h.data_off;
        return d;
    });
}

} // namespace tautorch::bindings
