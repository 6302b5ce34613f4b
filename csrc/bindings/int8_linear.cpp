#include "bindings/call.h"
#include "kernels/int8_linear/int8_linear.h"

namespace tautorch::bindings {
namespace {

struct Plan {
    Int8LinearArgs args;
    int64_t n, k;
    const char *kernel;
};

// plan, x, x dtype, rows, row stride in elements, out, out dtype
void run(Args &a) {
    static const int slot = op_slot("int8_linear");
    Plan p = a.plan<Plan>();
    p.args.x = a.pointer<const void>();
    p.args.quant.dtype = static_cast<DType>(a.integer());
    p.args.m = a.integer();
    p.args.x_stride = a.integer();
    p.args.out.data = a.pointer<void>();
    p.args.out.epilogue.out_dtype = static_cast<DType>(a.integer());
    a.done();
    note_used(slot, p.kernel);
    run_released(p.args.m * p.n * p.k, [&] { int8_linear(p.args); });
}

PyMethodDef kRun = {"int8_linear_run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fastcall<run>)),
                    METH_FASTCALL, "int8_linear_run(plan, x, x_dtype, m, x_stride, out, out_dtype)"};

} // namespace

void bind_int8_linear(py::module_ &m) {
    // A plan is a bytes object that holds addresses: whoever keeps it keeps the tensors alive.
    m.def("int8_linear_plan", [](int64_t packed, int64_t bytes, int64_t k, const py::dict &tail) {
        Plan p;
        const PackHeader &h = checked_header("int8_linear", at<const uint8_t>(packed), bytes);
        if (h.k != k || h.taps != 1 || h.groups != 1 || h.kind > PackKind::dense_w8)
            throw py::value_error("int8_linear: packed weights are of another shape or kind");
        p.args.packed = at<const uint8_t>(packed);
        p.args.quant = quant_of(tail);
        p.args.out.epilogue = epilogue_of(tail);
        p.args.out.row_stride = h.n;
        p.n = h.n;
        p.k = h.k;
        p.kernel = find_isa(h.isa)->name;
        return as_plan(p);
    });
    PyModule_AddObject(m.ptr(), kRun.ml_name, PyCFunction_New(&kRun, nullptr));
}

} // namespace tautorch::bindings
