// Plans of the linear operators and of the convolutions: what a call needs besides x and out, as bytes.
// A plan holds addresses; whoever keeps it keeps the tensors alive.
#pragma once

#include "bindings/call.h"
#include "kernels/common/product.h"

namespace tautorch::bindings {

template <class T> struct Plan {
    T args;
    int64_t macs = 0; // per row of x, or per output pixel
    const char *kernel = nullptr;
    int32_t slot = -1; // of the operator: plans of two operators may have the same size
};

// The plan in the first argument, of the operator in `slot`.
template <class T> Plan<T> plan_of(Args &a, int slot) {
    const Plan<T> p = a.plan<Plan<T>>();
    if (p.slot != slot)
        throw py::type_error("argument is no plan of this function");
    return p;
}

// Whether the image has room for the filter.
void check_image(const Geometry &g);

// plan, x, x dtype, rows, row stride in elements, out, out dtype
template <class T> void run_linear(Args &a, int slot, void (*op)(const T &)) {
    Plan<T> p = plan_of<T>(a, slot);
    p.args.x = a.pointer<const void>();
    const int64_t x_dtype = a.integer();
    p.args.m = a.integer();
    const int64_t stride = a.integer();
    p.args.out.data = a.pointer<void>();
    const int64_t out_dtype = a.integer();
    a.done();
    check_call(p.args.quant, x_dtype, out_dtype, p.args.m);
    if (p.args.m < 0)
        throw py::value_error("rows must not be negative");
    if (!p.args.x && p.args.m * header_of(p.args.packed).k > 0)
        throw py::value_error("x has no memory");
    p.args.x_stride = p.args.x ? stride : 0; // rows of no elements lie nowhere
    p.args.quant.dtype = static_cast<DType>(x_dtype);
    p.args.out.epilogue.out_dtype = static_cast<DType>(out_dtype);
    note_used(slot, p.kernel);
    run_released(p.args.m * p.macs, [&] { op(p.args); });
}

// plan, x, x dtype, batch, height, width, x channels last, out, out dtype, out channels last
template <class T> void run_conv(Args &a, int slot, void (*op)(const T &)) {
    Plan<T> p = plan_of<T>(a, slot);
    p.args.x = a.pointer<const void>();
    const int64_t x_dtype = a.integer();
    Geometry &g = p.args.geometry;
    g.batch = a.integer();
    g.height = a.integer();
    g.width = a.integer();
    p.args.channels_last = a.integer() != 0;
    p.args.out = a.pointer<void>();
    const int64_t out_dtype = a.integer();
    p.args.out_channels_last = a.integer() != 0;
    a.done();
    check_call(p.args.quant, x_dtype, out_dtype, g.batch);
    check_image(g);
    if (!p.args.x && g.batch * g.height * g.width * p.macs > 0)
        throw py::value_error("x has no memory");
    // One pixel, or one channel, lies in memory the same way in both layouts. As channels last it needs no
    // transposition: 2.1 us become 0.4 for 64 channels.
    p.args.channels_last |= g.height * g.width == 1 || g.channels == 1;
    p.args.out_channels_last |= g.out_pixels() == 1 || p.args.outputs == 1;
    p.args.quant.dtype = static_cast<DType>(x_dtype);
    p.args.epilogue.out_dtype = static_cast<DType>(out_dtype);
    note_used(slot, p.kernel);
    run_released(g.batch * g.out_pixels() * p.macs, [&] { op(p.args); });
}

// in_channels, kh, kw, sh, sw, ph, pw, dh, dw. any_form: of a pack as conv.h has it, else with kh * kw taps.
void fill_conv(const char *op, ConvArgs &args, const PackHeader &h, const uint8_t *packed, int64_t outputs,
               const py::tuple &geometry, const py::dict &tail, bool any_form = false);

// The bytes of a plan of `op` whose args are filled in.
template <class T> py::bytes finish_plan(const char *op, Plan<T> &p, const PackHeader &h, int64_t macs) {
    p.macs = macs;
    p.kernel = find_isa(h.isa)->name;
    p.slot = op_slot(op);
    return as_plan(p);
}

#define TAUTORCH_FASTCALL(module, name, function)                                                            \
    do {                                                                                                     \
        static PyMethodDef def = {name, as_function(&fastcall<function>), METH_FASTCALL, nullptr};           \
        PyModule_AddObject((module).ptr(), def.ml_name, PyCFunction_New(&def, nullptr));                     \
    } while (0)

} // namespace tautorch::bindings
