// Whether what was made earlier still holds: plans kept by modules and by the torch operators. Asked at every
// call, so in C: the same questions in Python take several times as long.
#include "bindings/objects.h"

namespace tautorch::bindings {
namespace {

bool equal(PyObject *a, PyObject *b) {
    const int same = PyObject_RichCompareBool(a, b, Py_EQ);
    if (same < 0)
        throw py::error_already_set();
    return same != 0;
}

void check_tuple(PyObject *p, Py_ssize_t size) {
    if (!PyTuple_Check(p) || PyTuple_GET_SIZE(p) != size)
        throw py::type_error("no tuple of " + std::to_string(size));
}

// A stamp is (data_ptr, version, content, dtype, shape, stride); None where it does not matter. See
// ops/caches.py. Content, bytes, is held against the memory only once all the rest has agreed.
constexpr Py_ssize_t kStamp = 6;
bool holds(PyObject *tensor, PyObject *stamp) {
    check_tuple(stamp, kStamp);
    const Names &n = names();
    const Ref address = steal(PyObject_CallMethodNoArgs(tensor, n.data_ptr));
    if (!equal(address.ptr(), item(stamp, 0)))
        return false;
    if (item(stamp, 1) != Py_None) {
        PyObject *const version = PyObject_GetAttr(tensor, n.version);
        if (!version) { // an inference tensor has none
            PyErr_Clear();
            return false;
        }
        if (!equal(steal(version).ptr(), item(stamp, 1)))
            return false;
    }
    if (item(stamp, 3) != Py_None &&
        (steal(PyObject_GetAttr(tensor, n.dtype)).ptr() != item(stamp, 3) ||
         !equal(steal(PyObject_GetAttr(tensor, n.shape)).ptr(), item(stamp, 4)) ||
         !equal(steal(PyObject_CallMethodNoArgs(tensor, n.stride)).ptr(), item(stamp, 5))))
        return false;
    PyObject *const content = item(stamp, 2);
    if (content == Py_None)
        return true;
    const void *at = PyLong_AsVoidPtr(address.ptr());
    return PyBytes_Check(content) && at &&
           std::memcmp(at, PyBytes_AS_STRING(content), static_cast<size_t>(PyBytes_GET_SIZE(content))) == 0;
}

Ref referent(PyObject *weak) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *t = nullptr;
    if (PyWeakref_GetRef(weak, &t) < 0)
        throw py::error_already_set();
    return py::reinterpret_steal<Ref>(t);
#else
    return py::reinterpret_borrow<Ref>(PyWeakref_GetObject(weak));
#endif
}

// Sizes, flags and names: what a schema has beside tensors and dtypes.
bool has_value(PyObject *p) {
    return PyLong_Check(p) || PyUnicode_CheckExact(p) || PyList_CheckExact(p) || PyTuple_CheckExact(p);
}

// An entry is (epoch, dtype of x, width of x, weak reference to the first argument, arguments with None in
// its place, ((position, stamp), ...), what to return, what to keep alive).
constexpr Py_ssize_t kEntry = 8, kResult = 6;
bool matches(PyObject *entry, PyObject *const *call, PyObject *arguments) {
    check_tuple(entry, kEntry);
    if (item(entry, 1) != call[1] || !equal(item(entry, 0), call[0]) || !equal(item(entry, 2), call[2]))
        return false;
    PyObject *const known = item(entry, 4), *const stamps = item(entry, 5);
    const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
    if (!PyTuple_Check(known) || !PyTuple_Check(stamps))
        throw py::type_error("recall: an entry's arguments and stamps must be tuples");
    if (PyTuple_GET_SIZE(known) != count || referent(item(entry, 3)).ptr() != item(arguments, 0))
        return false;
    for (Py_ssize_t i = 1; i < count; ++i) {
        PyObject *const a = item(known, i), *const b = item(arguments, i);
        // All else, tensors above all, is the same object or another: never asked whether it is equal.
        if (a != b && (Py_TYPE(a) != Py_TYPE(b) || !has_value(a) || !equal(a, b)))
            return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(stamps); ++i) {
        PyObject *const s = item(stamps, i);
        check_tuple(s, 2);
        const Py_ssize_t at = PyLong_AsSsize_t(item(s, 0));
        if (at < 0 || at >= count)
            throw py::type_error("recall: a stamp's position is out of range");
        if (!holds(item(arguments, at), item(s, 1)))
            return false;
    }
    return true;
}

// recall(entries, epoch, dtype of x, width of x, arguments): what was kept for these very arguments in
// entries[id(arguments[0])], a list, or None.
PyObject *recall(PyObject *, PyObject *const *args, Py_ssize_t n) {
    return guarded([&]() -> PyObject * {
        if (n != 5 || !PyDict_Check(args[0]) || !PyTuple_Check(args[4]) || PyTuple_GET_SIZE(args[4]) < 1)
            throw py::type_error("recall: arguments must be a dict, 3 values and a tuple");
        const Ref key = steal(PyLong_FromVoidPtr(item(args[4], 0)));
        PyObject *const found = value_of(args[0], key.ptr());
        if (!found)
            Py_RETURN_NONE;
        // Attributes of tensors may run anything, which may drop the entries.
        const Ref list = py::reinterpret_borrow<Ref>(found);
        if (!PyList_Check(found))
            throw py::type_error("recall: entries must be lists");
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list.ptr()); ++i) {
            const Ref entry = py::reinterpret_borrow<Ref>(PyList_GET_ITEM(list.ptr(), i));
            if (matches(entry.ptr(), args + 1, args[4])) {
                PyObject *const result = item(entry.ptr(), kResult);
                Py_INCREF(result);
                return result;
            }
        }
        Py_RETURN_NONE;
    });
}

PyObject *unchanged(PyObject *, PyObject *const *args, Py_ssize_t n) {
    return guarded([&]() -> PyObject * {
        if (n != 2)
            throw py::type_error("unchanged: arguments must be two lists");
        return py::bool_(is_unchanged(args[0], args[1])).release().ptr();
    });
}

PyMethodDef kUnchanged = {"unchanged", as_function(unchanged), METH_FASTCALL, "unchanged(seen, stamps)"};
PyMethodDef kRecall = {"recall", as_function(recall), METH_FASTCALL,
                       "recall(entries, epoch, dtype, width, arguments)"};

} // namespace

bool is_unchanged(PyObject *seen_list, PyObject *stamps_list) {
    if (!PyList_Check(seen_list) || !PyList_Check(stamps_list))
        throw py::type_error("unchanged: arguments must be two lists");
    // The lists may be replaced by another thread while attributes are read: they are held until the end.
    const Ref seen = py::reinterpret_borrow<Ref>(seen_list),
              stamps = py::reinterpret_borrow<Ref>(stamps_list);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(seen.ptr()); ++i) {
        PyObject *t = PyList_GET_ITEM(seen.ptr(), i);
        check_tuple(t, 3);
        if (!PyDict_Check(item(t, 0)))
            throw py::type_error("unchanged: every entry must be (dict, key, value)");
        if (value_of(item(t, 0), item(t, 1)) != item(t, 2))
            return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(stamps.ptr()); ++i) {
        PyObject *t = PyList_GET_ITEM(stamps.ptr(), i);
        check_tuple(t, 2);
        if (!holds(item(t, 0), item(t, 1)))
            return false;
    }
    return true;
}

void bind_recall(py::module_ &m) {
    for (PyMethodDef *def : {&kUnchanged, &kRecall})
        PyModule_AddObject(m.ptr(), def->ml_name, PyCFunction_New(def, nullptr));
}

} // namespace tautorch::bindings
