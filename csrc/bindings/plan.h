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
};

// plan, x, x dtype, rows, row stride in elements, out, out dtype
template <class T> void run_linear(Args &a, int slot, void (*op)(const T &)) {
    Plan<T> p = a.plan<Plan<T>>();
    p.args.x = a.pointer<const void>();
    p.args.quant.dtype = static_cast<DType>(a.integer());
    p.args.m = a.integer();
    p.args.x_stride = a.integer();
    p.args.out.data = a.pointer<void>();
    p.args.out.epilogue.out_dtype = static_cast<DType>(a.integer());
    a.done();
    note_used(slot, p.kernel);
    run_released(p.args.m * p.macs, [&] { op(p.args); });
}

// plan, x, x dtype, batch, height, width, x channels last, out, out dtype, out channels last
template <class T> void run_conv(Args &a, int slot, void (*op)(const T &)) {
    Plan<T> p = a.plan<Plan<T>>();
    p.args.x = a.pointer<const void>();
    p.args.quant.dtype = static_cast<DType>(a.integer());
    Geometry &g = p.args.geometry;
    g.batch = a.integer();
    g.height = a.integer();
    g.width = a.integer();
    p.args.channels_last = a.integer() != 0;
    p.args.out = a.pointer<void>();
    p.args.epilogue.out_dtype = static_cast<DType>(a.integer());
    p.args.out_channels_last = a.integer() != 0;
    a.done();
    note_used(slot, p.kernel);
    run_released(g.batch * g.out_pixels() * p.macs, [&] { op(p.args); });
}

// The part of a linear plan every operator has; `outputs` is the width of a row of out.
void fill_linear(LinearArgs &args, const PackHeader &h, const uint8_t *packed, int64_t outputs,
                 const py::dict &tail);
// in_channels, kh, kw, sh, sw, ph, pw, dh, dw
void fill_conv(const char *op, ConvArgs &args, const PackHeader &h, const uint8_t *packed, int64_t outputs,
               const py::tuple &geometry, const py::dict &tail);
int64_t macs_of(const PackHeader &h);

#define TAUTORCH_FASTCALL(module, name, function)                                                            \
    do {                                                                                                     \
        static PyMethodDef def = {                                                                           \
            name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&fastcall<function>)),          \
            METH_FASTCALL, nullptr};                                                                         \
        PyModule_AddObject((module).ptr(), def.ml_name, PyCFunction_New(&def, nullptr));                     \
    } while (0)

} // namespace tautorch::bindings
