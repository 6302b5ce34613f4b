#include "kernels/lowrank_linear/lowrank_linear.h"
#include "bindings/plan.h"

namespace tautorch::bindings {
namespace {

void run(Args &a) {
    static const int slot = op_slot("lowrank_linear");
    run_linear<LowRankLinearArgs>(a, slot, lowrank_linear);
}

} // namespace

void bind_lowrank_linear(py::module_ &m) {
    m.def("lowrank_linear_plan", [](int64_t down, int64_t down_bytes, int64_t up, int64_t up_bytes, int64_t k,
                                    int64_t down_scale, const py::dict &tail) {
        const PackHeader &d = checked_pack("lowrank_linear", at<const uint8_t>(down), down_bytes);
        const PackHeader &u = checked_pack("lowrank_linear", at<const uint8_t>(up), up_bytes);
        if (d.k != k || d.n != u.k || d.kind != u.kind || d.isa != u.isa ||
            d.taps * u.taps * d.groups * u.groups != 1 || d.kind > PackKind::dense_f32)
            throw py::value_error("lowrank_linear: packed factors do not fit each other or x");
        Plan<LowRankLinearArgs> p;
        fill_linear("lowrank_linear", p.args, d, at<const uint8_t>(down), u.n, tail);
        p.args.up = at<const uint8_t>(up);
        p.args.down_scale = at<const float>(down_scale);
        return finish_plan("lowrank_linear", p, d, macs_of(d) + macs_of(u));
    });
    TAUTORCH_FASTCALL(m, "lowrank_linear_run", run);
}

} // namespace tautorch::bindings
