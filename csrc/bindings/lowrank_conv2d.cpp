#include "kernels/lowrank_conv2d/lowrank_conv2d.h"
#include "bindings/plan.h"

namespace tautorch::bindings {
namespace {

void run(Args &a) {
    static const int slot = op_slot("lowrank_conv2d");
    run_conv<LowRankConv2dArgs>(a, slot, lowrank_conv2d);
}

} // namespace

void bind_lowrank_conv2d(py::module_ &m) {
    m.def("lowrank_conv2d_plan", [](int64_t down, int64_t down_bytes, int64_t up, int64_t up_bytes,
                                    int64_t down_scale, const py::tuple &geometry, const py::dict &tail) {
        const PackHeader &d = checked_pack("lowrank_conv2d", at<const uint8_t>(down), down_bytes);
        const PackHeader &u = checked_pack("lowrank_conv2d", at<const uint8_t>(up), up_bytes);
        if (d.n != u.k || d.groups != u.groups || u.taps != 1 || d.kind != u.kind || d.isa != u.isa ||
            d.kind > PackKind::dense_f32)
            throw py::value_error("lowrank_conv2d: packed factors do not fit each other");
        Plan<LowRankConv2dArgs> p;
        fill_conv("lowrank_conv2d", p.args, d, at<const uint8_t>(down), u.groups * u.n, geometry, tail);
        p.args.up = at<const uint8_t>(up);
        p.args.down_scale = at<const float>(down_scale);
        return finish_plan("lowrank_conv2d", p, d, macs_of(d) + macs_of(u));
    });
    TAUTORCH_FASTCALL(m, "lowrank_conv2d_run", run);
}

} // namespace tautorch::bindings
