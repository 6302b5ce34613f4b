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
        Plan<LowRankLinearArgs> p;
        const PackHeader &h =
            fill_lowrank(p.args, {at<const uint8_t>(down), down_bytes}, {at<const uint8_t>(up), up_bytes},
                         {at<const uint8_t>(residual), residual_bytes}, k, at<const float>(down_scale),
                         at<const float>(residual_scale), tail_of(tail));
        return finish_plan("lowrank_linear", p, h, macs_of(p.args));
    });
    TAUTORCH_FASTCALL(m, "lowrank_linear_run", run);
}

} // namespace tautorch::bindings
