#include "bindings/plan.h"
#include "kernels/common/conv.h"

#include <cstdint>

namespace tautorch::bindings {

void check_image(const Geometry &g) {
    constexpr int64_t most = INT32_MAX; // so that products of two fit
    if (g.batch < 0 || g.height < 0 || g.width < 0 || g.batch > most || g.height > most || g.width > most ||
        g.height + 2 * g.ph <= g.dh * (g.kh - 1) || g.width + 2 * g.pw <= g.dw * (g.kw - 1))
        throw py::value_error("the image must be at least as large as the filter");
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
    args.quant = checked_quant(op, tail_of(tail), h);
    args.epilogue = checked_epilogue(op, tail_of(tail), outputs);
    args.outputs = outputs;
}

} // namespace tautorch::bindings
