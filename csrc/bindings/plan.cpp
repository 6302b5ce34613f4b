#include "bindings/plan.h"
#include "kernels/common/cells.h"
#include "kernels/common/conv.h"

#include <cstdint>

namespace tautorch::bindings {

int64_t macs_of(const PackHeader &h) {
    if (h.cells > 0)
        return h.cells * cell_bytes(h);
    if (h.kind == PackKind::sparse_i8 || h.kind == PackKind::sparse_f32)
        return h.entries * h.gs * (h.kind == PackKind::sparse_i8 ? 4 : 1);
    return h.groups * h.n * h.k * h.taps;
}

void check_call(const ActQuant &q, int64_t x_dtype, int64_t out_dtype, int64_t scales) {
    const bool given = q.mode == ActQuant::given;
    const auto i8 = static_cast<int64_t>(DType::i8), i32 = static_cast<int64_t>(DType::i32);
    if (x_dtype < 0 || x_dtype > i8 || (x_dtype == i8) != given)
        throw py::value_error("this plan is not for x of dtype code " + std::to_string(x_dtype));
    if (out_dtype < 0 || out_dtype > i32 || (out_dtype == i32 && q.mode == ActQuant::none))
        throw py::value_error("this plan is not for out of dtype code " + std::to_string(out_dtype));
    if (given && q.given_scales != 1 && q.given_scales != scales)
        throw py::value_error("this plan is for " + std::to_string(q.given_scales) + " scales of x, got " +
                              std::to_string(scales));
}

void check_image(const Geometry &g) {
    constexpr int64_t most = INT32_MAX; // so that products of two fit
    if (g.batch < 0 || g.height < 0 || g.width < 0 || g.batch > most || g.height > most || g.width > most ||
        g.height + 2 * g.ph <= g.dh * (g.kh - 1) || g.width + 2 * g.pw <= g.dw * (g.kw - 1))
        throw py::value_error("the image must be at least as large as the filter");
}

namespace {

ActQuant fitting_quant(const char *op, const PackHeader &h, const py::dict &tail) {
    const ActQuant q = quant_of(op, tail);
    const bool floating = operand_of(*find_isa(h.isa), h.kind) == OperandKind::f32;
    if (floating != (q.mode == ActQuant::none))
        throw py::value_error(std::string(op) + ": packed weights are of another kind than the activations");
    return q;
}

} // namespace

void fill_linear(const char *op, LinearArgs &args, const PackHeader &h, const uint8_t *packed,
                 int64_t outputs, const py::dict &tail) {
    args.packed = packed;
    args.quant = fitting_quant(op, h, tail);
    args.out.epilogue = epilogue_of(op, tail, outputs);
    args.out.row_stride = outputs;
}

void fill_conv(const char *op, ConvArgs &args, const PackHeader &h, const uint8_t *packed, int64_t outputs,
               const py::tuple &geometry, const py::dict &tail, bool any_form) {
    Geometry &g = args.geometry;
    int64_t *const fields[] = {&g.channels, &g.kh, &g.kw, &g.sh, &g.sw, &g.ph, &g.pw, &g.dh, &g.dw};
    if (geometry.size() != std::size(fields))
        throw py::value_error(std::string(op) + ": geometry must have 9 integers");
    for (size_t i = 0; i < std::size(fields); ++i) {
        *fields[i] = geometry[i].cast<int64_t>();
        const bool padding = fields[i] == &g.ph || fields[i] == &g.pw;
        if (*fields[i] < (padding ? 0 : 1) || *fields[i] > INT32_MAX)
            throw py::value_error(std::string(op) + ": geometry is out of range");
    }
    if (any_form ? !conv_pack_fits(h, g) : h.groups * h.k != g.channels || h.taps != g.kh * g.kw)
        throw py::value_error(std::string(op) + ": packed weights are of another shape");
    args.packed = packed;
    args.quant = fitting_quant(op, h, tail);
    args.epilogue = epilogue_of(op, tail, outputs);
    args.outputs = outputs;
}

} // namespace tautorch::bindings
