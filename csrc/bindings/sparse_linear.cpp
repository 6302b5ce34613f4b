#include "kernels/sparse_linear/sparse_linear.h"
#include "bindings/plan.h"

namespace tautorch::bindings {
namespace {

void run(Args &a) {
    static const int slot = op_slot("sparse_linear");
    run_linear<LinearArgs>(a, slot, sparse_linear);
}

} // namespace

void bind_sparse_linear(py::module_ &m) {
    m.def("sparse_linear_plan", [](int64_t packed, int64_t bytes, int64_t k, const py::dict &tail) {
        const PackHeader &h = checked_linear("sparse_linear", at<const uint8_t>(packed), bytes, k, true);
        Plan<LinearArgs> p;
        fill_linear("sparse_linear", p.args, h, at<const uint8_t>(packed), h.n, tail_of(tail));
        return finish_plan("sparse_linear", p, h, macs_of(h));
    });
    TAUTORCH_FASTCALL(m, "sparse_linear_run", run);
}

} // namespace tautorch::bindings
