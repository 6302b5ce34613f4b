#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "bindings/plan.h"

namespace tautorch::bindings {
namespace {

void run(Args &a) {
    static const int slot = op_slot("sparse_conv2d");
    run_conv<ConvArgs>(a, slot, sparse_conv2d);
}

} // namespace

void bind_sparse_conv2d(py::module_ &m) {
    m.def("sparse_conv2d_plan", [](int64_t packed, int64_t bytes, const py::tuple &geometry,
                                   const py::dict &tail) {
        const PackHeader &h = checked_pack("sparse_conv2d", at<const uint8_t>(packed), bytes);
        if (h.kind == PackKind::depthwise_i8 || h.kind == PackKind::pairs_i8 ||
            h.kind == PackKind::grouped_i8)
            throw py::value_error("sparse_conv2d: packed weights are of another kind");
        Plan<ConvArgs> p;
        fill_conv("sparse_conv2d", p.args, h, at<const uint8_t>(packed), h.groups * h.n, geometry, tail);
        return finish_plan("sparse_conv2d", p, h, macs_of(h));
    });
    TAUTORCH_FASTCALL(m, "sparse_conv2d_run", run);
}

} // namespace tautorch::bindings
