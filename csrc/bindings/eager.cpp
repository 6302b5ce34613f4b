// A layer's call in plain eager CPU inference, in C: what `forward` asks before its kernel may run, and the
// call, take 0.9 us less than as bytecode at 64 x 64 (Zen 4), more where a kernel has streamed a weight
// through the caches.
#include "bindings/objects.h"

namespace tautorch::bindings {
namespace {

bool is_true(const Ref &r) {
    const int truth = PyObject_IsTrue(r.ptr());
    if (truth < 0)
        throw py::error_already_set();
    return truth != 0;
}

bool says(PyObject *tensor, PyObject *name) { return is_true(steal(PyObject_GetAttr(tensor, name))); }

bool answered(PyObject *question) { return is_true(steal(PyObject_CallNoArgs(question))); }

int64_t integer(PyObject *p) {
    const long long v = PyLong_AsLongLong(p);
    if (v == -1 && PyErr_Occurred())
        throw py::error_already_set();
    return v;
}

// An entry that has to be there.
PyObject *entry(PyObject *dict, PyObject *key) {
    if (!PyDict_Check(dict))
        throw py::type_error("eager_call: no dict");
    PyObject *const value = value_of(dict, key);
    if (!value) {
        PyErr_SetObject(PyExc_KeyError, key);
        throw py::error_already_set();
    }
    return value;
}

// As nn/eager.py has it: (torch.Tensor, questions that plain inference answers by nothing, is_grad_enabled,
// variables of forward-mode differentiation, variables of the dispatch table, "is_cpu", "is_cuda", a question
// that has to be answered by nothing on CUDA, or None where there is no CUDA).
constexpr Py_ssize_t kState = 8;
enum Where { nowhere, on_cpu, on_cuda };

// Where plain inference of x with these parameters runs.
Where plain(PyObject *state, PyObject *parameters, PyObject *x) {
    if (!PyTuple_Check(state) || PyTuple_GET_SIZE(state) != kState)
        throw py::type_error("eager_call: state must be a tuple of 8");
    if (reinterpret_cast<PyObject *>(Py_TYPE(x)) != item(state, 0))
        return nowhere;
    PyObject *const questions = item(state, 1);
    if (!PyTuple_Check(questions))
        throw py::type_error("eager_call: questions must be a tuple");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(questions); ++i)
        if (answered(item(questions, i)))
            return nowhere;
    const Names &n = names();
    if (integer(entry(item(state, 3), n.level)) >= 0)
        return nowhere;
    // Held, as attributes of tensors may run anything. Where something else stands for the parameter (a
    // replica's tensor, a parametrisation, a pruned or flattened one), a plan does not know of it.
    if (!PyDict_Check(parameters))
        throw py::type_error("eager_call: no dict");
    const Ref bias = py::reinterpret_borrow<Ref>(value_of(parameters, n.bias));
    if (!bias)
        return nowhere;
    // A function mode, if there were one, would be asked for an attribute too.
    Where where = on_cpu;
    if (!says(x, item(state, 5))) {
        if (item(state, 7) == Py_None || !says(x, item(state, 6)) || answered(item(state, 7)))
            return nowhere;
        where = on_cuda;
    }
    if (!answered(item(state, 2)))
        return where;
    return !says(x, n.requires_grad) && (bias.is_none() || !says(bias.ptr(), n.requires_grad)) ? where
                                                                                               : nowhere;
}

// A module's call for x's dtype; nothing where x has to take the way round: not plain inference (see
// nn/eager.py), plans that do not hold any more, no plan.
Ref call_of(PyObject *state, PyObject *module, PyObject *x) {
    const Names &n = names();
    const Where where = plain(state, entry(module, n.parameters), x);
    if (where == nowhere)
        return {};
    PyObject *const handed = entry(module, n.handed);
    if (!PyDict_Check(handed) || PyDict_GET_SIZE(handed) ||
        integer(entry(module, n.own_epoch)) != integer(entry(item(state, 4), n.epoch)) ||
        !is_unchanged(entry(module, n.seen), entry(module, n.stamps)))
        return {};
    const Ref dtype = steal(PyObject_GetAttr(x, n.dtype));
    PyObject *const plans = entry(module, where == on_cpu ? n.plans : n.gpu_calls);
    return py::reinterpret_borrow<Ref>(PyDict_Check(plans) ? value_of(plans, dtype.ptr()) : nullptr);
}

Ref address(PyObject *tensor) {
    PyObject *self[1] = {tensor};
    return steal(PyObject_VectorcallMethod(names().data_ptr, self, 1, nullptr));
}

// The same for a call on CUDA, as ops/_gpu_product.py makes it: (operator, k, n, code of x's dtype, output
// dtype, its code, device, stream, what tells the device's stream, <op>_run, what is known by the number of
// rows, names of the kernels that ran, torch.uint8). Nothing for another device or stream, for rows not seen
// before, for x off 16 bytes.
Ref gpu_rows(PyObject *call, PyObject *x, int64_t rows, PyObject **sizes, Py_ssize_t dims) {
    constexpr Py_ssize_t kCall = 13, kKnown = 4;
    if (PyTuple_GET_SIZE(call) != kCall || !PyDict_Check(item(call, 10)))
        throw py::type_error("run_rows: a call on CUDA must be a tuple of 13");
    const Ref m = steal(PyLong_FromLongLong(rows));
    // Held: another thread may forget it.
    const Ref known = py::reinterpret_borrow<Ref>(value_of(item(call, 10), m.ptr()));
    if (!known)
        return {};
    if (!PyTuple_Check(known.ptr()) || PyTuple_GET_SIZE(known.ptr()) < kKnown)
        throw py::type_error("run_rows: what is known must be a tuple of 4 or more");
    PyObject *self[1] = {x}, *device[1] = {item(call, 6)};
    if (integer(steal(PyObject_VectorcallMethod(names().get_device, self, 1, nullptr)).ptr()) !=
        integer(device[0]))
        return {};
    const Ref stream = steal(PyObject_Vectorcall(item(call, 8), device, 1, nullptr)), from = address(x);
    if (integer(stream.ptr()) != integer(item(call, 7)) || integer(from.ptr()) % 16)
        return {};
    const int64_t k = integer(item(call, 1)), x_code = integer(item(call, 3)), int8_code = 3;
    // The last 16 bytes of a single int8 row could end past its memory, so it is not said to be padded.
    const int64_t step = rows > 1 || x_code == int8_code ? k : (k + 15) / 16 * 16;
    const bool same = x_code == integer(item(call, 5));
    Ref out = steal(PyObject_VectorcallMethod(names().new_empty, sizes, static_cast<size_t>(dims) + 1,
                                              same ? nullptr : names().dtype_only));
    PyObject *bytes[3] = {x, item(known.ptr(), 2), item(call, 12)};
    const Ref workspace = steal(PyObject_VectorcallMethod(names().new_empty, bytes, 2, names().dtype_only));
    const Ref row = steal(PyLong_FromLongLong(step)), one = steal(PyLong_FromLong(1)),
              to = address(out.ptr()), work = address(workspace.ptr());
    PyObject *const all[13] = {item(known.ptr(), 0),
                               item(known.ptr(), 1),
                               from.ptr(),
                               item(call, 3),
                               m.ptr(),
                               row.ptr(),
                               one.ptr(),
                               item(call, 5),
                               item(call, 6),
                               to.ptr(),
                               item(call, 2),
                               work.ptr(),
                               stream.ptr()};
    steal(PyObject_Vectorcall(item(call, 9), all, 13, nullptr));
    if (PyDict_SetItem(item(call, 11), item(call, 0), item(known.ptr(), 3)) < 0)
        throw py::error_already_set();
    return out;
}

// Whether x's memory holds the numbers negated, as in the imaginary part of a conjugate. Of contiguous
// tensors only those of one number do; for the others the question would cost 45 ns.
bool is_negated(PyObject *x) { return is_true(steal(PyObject_CallMethod(x, "is_neg", nullptr))); }

// The output [..., n] of a linear operator's call, (plan, k, n, code of x's dtype, output dtype, its code,
// ...), on x [..., k] of that dtype; nothing where x is wider, narrower or not contiguous.
Ref rows_of(PyObject *run, PyObject *call, PyObject *x) {
    if (!PyTuple_Check(call) || PyTuple_GET_SIZE(call) < 6)
        throw py::type_error("run_rows: call must be a tuple of 6 or more");
    const Names &n = names();

    const Ref shape = steal(PyObject_GetAttr(x, n.shape));
    constexpr Py_ssize_t kDims = 8;
    const Py_ssize_t dims = PyTuple_Check(shape.ptr()) ? PyTuple_GET_SIZE(shape.ptr()) : 0;
    if (dims < 1 || dims > kDims || integer(item(shape.ptr(), dims - 1)) != integer(item(call, 1)))
        return {};
    PyObject *self[1] = {x};
    if (!is_true(steal(PyObject_VectorcallMethod(n.is_contiguous, self, 1, nullptr))))
        return {};
    // Sizes one by one and the dtype from x: 0.35 us less than a tuple of sizes and a dtype.
    PyObject *sizes[kDims + 2] = {x};
    int64_t rows = 1;
    for (Py_ssize_t i = 0; i + 1 < dims; ++i) {
        sizes[i + 1] = item(shape.ptr(), i);
        rows *= integer(sizes[i + 1]);
    }
    if (rows * integer(item(call, 1)) == 1 && is_negated(x))
        return {};
    sizes[dims] = item(call, 2);
    sizes[dims + 1] = item(call, 4);
    if (PyUnicode_Check(item(call, 0)))
        return gpu_rows(call, x, rows, sizes, dims);
    const bool same = integer(item(call, 3)) == integer(item(call, 5));
    Ref out = steal(PyObject_VectorcallMethod(n.new_empty, sizes, static_cast<size_t>(dims) + 1,
                                              same ? nullptr : names().dtype_only));
    const Ref from = address(x), into = address(out.ptr()), m = steal(PyLong_FromLongLong(rows));
    PyObject *const all[7] = {item(call, 0), from.ptr(), item(call, 3), m.ptr(),
                              item(call, 1), into.ptr(), item(call, 5)};
    steal(PyObject_Vectorcall(run, all, 7, nullptr));
    return out;
}

// The output of a convolution's call as ops/geometry.py makes it, on x [b, channels, h, w] of that dtype, in
// x's memory format; nothing where x has other channels, is too small, or lies in neither format.
// makers: (torch.empty, torch.channels_last).
Ref images_of(PyObject *makers, PyObject *run, PyObject *call, PyObject *x) {
    if (!PyTuple_Check(makers) || PyTuple_GET_SIZE(makers) != 2 || !PyTuple_Check(call) ||
        PyTuple_GET_SIZE(call) < 10)
        throw py::type_error("run_images: makers must be a pair, call a tuple of 10 or more");
    const Names &n = names();
    PyObject *const channels_last = item(makers, 1);
    const Ref shape = steal(PyObject_GetAttr(x, n.shape));
    if (!PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != 4 ||
        integer(item(shape.ptr(), 1)) != integer(item(call, 1)))
        return {};
    const auto outputs = [&](Py_ssize_t size, Py_ssize_t extent, Py_ssize_t stride) {
        const int64_t room = integer(item(shape.ptr(), size)) - integer(item(call, extent));
        return room < 0 ? 0 : room / integer(item(call, stride)) + 1;
    };
    const int64_t height = outputs(2, 3, 5), width = outputs(3, 4, 6);
    if (height < 1 || width < 1)
        return {};
    if (integer(item(shape.ptr(), 0)) * integer(item(call, 1)) * integer(item(shape.ptr(), 2)) *
                integer(item(shape.ptr(), 3)) ==
            1 &&
        is_negated(x))
        return {};
    PyObject *self[2] = {x, channels_last};
    bool last = !is_true(steal(PyObject_VectorcallMethod(n.is_contiguous, self, 1, nullptr)));
    if (last && !is_true(steal(PyObject_VectorcallMethod(n.is_contiguous, self, 1, n.format_only))))
        return {};
    if (!last && integer(item(call, 1)) == 1) { // of one channel x is both; its strides tell, as in torch
        const Ref strides = steal(PyObject_CallMethodNoArgs(x, n.stride));
        last = PyTuple_Check(strides.ptr()) && PyTuple_GET_SIZE(strides.ptr()) == 4 &&
               integer(item(strides.ptr(), 1)) == 1 &&
               integer(item(shape.ptr(), 2)) * integer(item(shape.ptr(), 3)) > 1;
    }
    const Ref oh = steal(PyLong_FromLongLong(height)), ow = steal(PyLong_FromLongLong(width));
    PyObject *sizes[7] = {x,        item(shape.ptr(), 0), item(call, 2), oh.ptr(),
                          ow.ptr(), item(call, 8),        channels_last};
    const bool same = integer(item(call, 7)) == integer(item(call, 9));
    Ref out = steal(!last && same ? PyObject_VectorcallMethod(n.new_empty, sizes, 5, nullptr)
                                  : PyObject_Vectorcall(item(makers, 0), sizes + 1, 4,
                                                        last ? n.dtype_and_format : n.dtype_only));
    if (integer(item(shape.ptr(), 0)) == 0)
        return out;
    const Ref from = address(x), into = address(out.ptr());
    PyObject *const order = last ? Py_True : Py_False;
    PyObject *const all[10] = {
        item(call, 0),        from.ptr(), item(call, 7), item(shape.ptr(), 0), item(shape.ptr(), 2),
        item(shape.ptr(), 3), order,      into.ptr(),    item(call, 9),        order};
    steal(PyObject_Vectorcall(run, all, 10, nullptr));
    return out;
}

bool empty_dict(PyObject *p) { return PyDict_Check(p) && PyDict_GET_SIZE(p) == 0; }

// Whether calling the module is calling its own forward and nothing else. As nn/eager.py has it: `usual` is
// (nn.Module, its __call__, its _call_impl, hooks of all modules).
bool unhooked(PyObject *usual, PyObject *forward, PyObject *module, PyObject *type) {
    if (!PyTuple_Check(usual) || PyTuple_GET_SIZE(usual) != 4 || !PyTuple_Check(item(usual, 3)))
        throw py::type_error("direct_call: usual must be a tuple of 4");
    const Names &n = names();
    if (steal(PyObject_GetAttr(type, n.forward)).ptr() != forward || value_of(module, n.forward) ||
        steal(PyObject_GetAttr(item(usual, 0), n.call)).ptr() != item(usual, 1) ||
        steal(PyObject_GetAttr(type, n.call_impl)).ptr() != item(usual, 2) || value_of(module, n.call_impl))
        return false;
    PyObject *const compiled = value_of(module, n.compiled_call);
    if (compiled && compiled != Py_None)
        return false;
    for (PyObject *name : {n.forward_hooks, n.forward_pre_hooks, n.backward_hooks, n.backward_pre_hooks})
        if (!empty_dict(entry(module, name)))
            return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(item(usual, 3)); ++i)
        if (!empty_dict(item(item(usual, 3), i)))
            return false;
    return true;
}

// What C returns for Python: None for nothing.
PyObject *given(Ref result) { return result ? result.release().ptr() : py::none().release().ptr(); }

void check_count(const char *name, Py_ssize_t count, Py_ssize_t want) {
    if (count != want)
        throw py::type_error(std::string(name) + ": takes " + std::to_string(want) + " arguments");
}

// where_plain(state, parameters of a module, x): 1 on the CPU, 2 on CUDA, 0 where it is not plain
PyObject *where_plain(PyObject *, PyObject *const *args, Py_ssize_t count) {
    return guarded([&] {
        check_count("where_plain", count, 3);
        return given(py::int_(static_cast<int>(plain(args[0], args[1], args[2]))));
    });
}

// eager_call(state, variables of a module, x)
PyObject *eager_call(PyObject *, PyObject *const *args, Py_ssize_t count) {
    return guarded([&] {
        check_count("eager_call", count, 3);
        return given(call_of(args[0], args[1], args[2]));
    });
}

// run_rows(run, call, x)
PyObject *run_rows(PyObject *, PyObject *const *args, Py_ssize_t count) {
    return guarded([&] {
        check_count("run_rows", count, 3);
        return given(rows_of(args[0], args[1], args[2]));
    });
}

// run_images(makers, run, call, x)
PyObject *run_images(PyObject *, PyObject *const *args, Py_ssize_t count) {
    return guarded([&] {
        check_count("run_images", count, 4);
        return given(images_of(args[0], args[1], args[2], args[3]));
    });
}

// direct_call(state, usual, forward, makers or None for rows, type, variables of a module, arguments, keyword
// arguments): what calling the module gives, or None where that takes nn.Module's way.
PyObject *direct_call(PyObject *, PyObject *const *args, Py_ssize_t count) {
    return guarded([&]() -> PyObject * {
        check_count("direct_call", count, 8);
        PyObject *const type = args[4], *const module = args[5], *const positional = args[6];
        if (!PyTuple_Check(positional) || PyTuple_GET_SIZE(positional) != 1 || !empty_dict(args[7]) ||
            !unhooked(args[1], args[2], module, type))
            Py_RETURN_NONE;
        PyObject *const x = item(positional, 0);
        const Ref call = call_of(args[0], module, x);
        if (!call)
            Py_RETURN_NONE;
        const Ref run = steal(PyObject_GetAttr(type, names().run));
        return given(args[3] == Py_None ? rows_of(run.ptr(), call.ptr(), x)
                                        : images_of(args[3], run.ptr(), call.ptr(), x));
    });
}

PyMethodDef kWherePlain = {"where_plain", as_function(where_plain), METH_FASTCALL,
                           "where_plain(state, parameters, x)"};
PyMethodDef kEagerCall = {"eager_call", as_function(eager_call), METH_FASTCALL,
                          "eager_call(state, module, x)"};
PyMethodDef kDirectCall = {"direct_call", as_function(direct_call), METH_FASTCALL,
                           "direct_call(state, usual, forward, makers, type, module, args, kwargs)"};
PyMethodDef kRunRows = {"run_rows", as_function(run_rows), METH_FASTCALL, "run_rows(run, call, x)"};
PyMethodDef kRunImages = {"run_images", as_function(run_images), METH_FASTCALL,
                          "run_images(makers, run, call, x)"};

} // namespace

void bind_eager(py::module_ &m) {
    names();
    for (PyMethodDef *def : {&kWherePlain, &kEagerCall, &kDirectCall, &kRunRows, &kRunImages})
        PyModule_AddObject(m.ptr(), def->ml_name, PyCFunction_New(def, nullptr));
}

} // namespace tautorch::bindings
