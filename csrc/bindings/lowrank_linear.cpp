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
                                    int64_t down_scale, int64_t residual, int64_t residual_bytes,
                                    int64_t residual_scale, const py::dict &tail) {
        const PackHeader &d = checked_pack("lowrank_linear", at<const uint8_t>(down), down_bytes);
        const PackHeader &u = checked_pack("lowrank_linear", at<const uint8_t>(up), up_bytes);
        if (d.k != k || d.n != u.k || d.kind != u.kind || d.isa != u.isa ||
            d.taps * u.taps * d.groups * u.groups != 1 || d.kind > PackKind::dense_f32)
            throw py::value_error("lowrank_linear: packed factors do not fit each other or x");
        Plan<LowRankLinearArgs> p;
        fill_linear("lowrank_linear", p.args, d, at<const uint8_t>(down), u.n, tail);
        p.args.up = at<const uint8_t>(up);
        p.args.down_scale = at<const float>(down_scale);
        int64_t macs = macs_of(d) + macs_of(u);
        if (residual) {
            const PackHeader &r = checked_pack("lowrank_linear", at<const uint8_t>(residual), residual_bytes);
            const bool integer = operand_of(*find_isa(r.isa), r.kind) != OperandKind::f32;
            if (r.k != k || r.n != u.n || r.isa != d.isa || r.taps * r.groups != 1 ||
                r.kind == PackKind::depthwise_i8 || r.kind == PackKind::dense_w8 ||
                (!integer && p.args.quant.mode != ActQuant::none))
                throw py::value_error("lowrank_linear: the packed residual does not fit the factors or x");
            p.args.residual = at<const uint8_t>(residual);
            p.args.residual_scale = at<const float>(residual_scale);
            macs += macs_of(r);
        }
        return finish_plan("lowrank_linear", p, d, macs);
    });
    TAUTORCH_FASTCALL(m, "lowrank_linear_run", run);
}

} // namespace tautorch::bindings
