#include "bindings/plan.h"

namespace tautorch::bindings {

int64_t macs_of(const PackHeader &h) {
    if (h.kind == PackKind::sparse_i8 || h.kind == PackKind::sparse_f32)
        return h.entries * h.gs * (h.kind == PackKind::sparse_i8 ? 4 : 1);
    return h.groups * h.n * h.k * h.taps;
}

void fill_linear(LinearArgs &args, const PackHeader &, const uint8_t *packed, int64_t outputs,
                 const py::dict &tail) {
    args.packed = packed;
    args.quant = quant_of(tail);
    args.out.epilogue = epilogue_of(tail);
    args.out.row_stride = outputs;
}

void fill_conv(const char *op, ConvArgs &args, const PackHeader &h, const uint8_t *packed, int64_t outputs,
               const py::tuple &geometry, const py::dict &tail) {
    Geometry &g = args.geometry;
    int64_t *const fields[] = {&g.channels, &g.kh, &g.kw, &g.sh, &g.sw, &g.ph, &g.pw, &g.dh, &g.dw};
    if (geometry.size() != std::size(fields))
        throw py::value_error(std::string(op) + ": geometry must have 9 integers");
    for (size_t i = 0; i < std::size(fields); ++i)
        *fields[i] = geometry[i].cast<int64_t>();
    if (h.groups * h.k != g.channels || h.taps != g.kh * g.kw)
        throw py::value_error(std::string(op) + ": packed weights are of another shape");
    args.packed = packed;
    args.quant = quant_of(tail);
    args.epilogue = epilogue_of(tail);
    args.outputs = outputs;
}

} // namespace tautorch::bindings
