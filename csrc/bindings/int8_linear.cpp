#include "kernels/int8_linear/int8_linear.h"
#include "bindings/plan.h"

namespace tautorch::bindings {
namespace {

void run(Args &a) {
    static const int slot = op_slot("int8_linear");
    run_linear<LinearArgs>(a, slot, int8_linear);
}

} // namespace

void bind_int8_linear(py::module_ &m) {
    m.def("int8_linear_plan", [](int64_t packed, int64_t bytes, int64_t k, const py::dict &tail) {
        const PackHeader &h = checked_linear("int8_linear", at<const uint8_t>(packed), bytes, k, false);
        Plan<LinearArgs> p;
        fill_linear("int8_linear", p.args, h, at<const uint8_t>(packed), h.n, tail_of(tail));
        return finish_plan("int8_linear", p, h, macs_of(h));
    });
    TAUTORCH_FASTCALL(m, "int8_linear_run", run);
}

} // namespace tautorch::bindings
