// Python objects from C, where every call of a layer passes: attributes by names made once, dicts, tuples.
#pragma once

#include "bindings/call.h"

namespace tautorch::bindings {

using Ref = py::object;

inline Ref steal(PyObject *p) {
    if (!p)
        throw py::error_already_set();
    return py::reinterpret_steal<Ref>(p);
}

inline PyObject *item(PyObject *tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }

// What a dict holds under a key, borrowed; null for nothing.
inline PyObject *value_of(PyObject *dict, PyObject *key) {
    PyObject *const value = PyDict_GetItemWithError(dict, key);
    if (!value && PyErr_Occurred())
        throw py::error_already_set();
    return value;
}

struct Names {
    static PyObject *of(const char *name) { return PyUnicode_InternFromString(name); }
    // of tensors
    PyObject *data_ptr = of("data_ptr"), *version = of("_version"), *dtype = of("dtype"),
             *shape = of("shape"), *stride = of("stride"), *is_cpu = of("is_cpu"),
             *requires_grad = of("requires_grad"), *is_contiguous = of("is_contiguous"),
             *new_empty = of("new_empty"), *memory_format = of("memory_format"),
             *get_device = of("get_device");
    // of modules and of packages
    PyObject *parameters = of("_parameters"), *bias = of("bias"), *seen = of("_seen"),
             *stamps = of("_stamps"), *handed = of("_handed"), *plans = of("_plans"),
             *gpu_calls = of("_gpu_calls"), *own_epoch = of("_epoch"), *epoch = of("epoch"),
             *level = of("_current_level"), *forward = of("forward"), *call = of("__call__"),
             *run = of("run"), *call_impl = of("_call_impl"), *compiled_call = of("_compiled_call_impl"),
             *forward_hooks = of("_forward_hooks"), *forward_pre_hooks = of("_forward_pre_hooks"),
             *backward_hooks = of("_backward_hooks"), *backward_pre_hooks = of("_backward_pre_hooks");
    // names of keyword arguments
    PyObject *dtype_only = PyTuple_Pack(1, dtype), *format_only = PyTuple_Pack(1, memory_format),
             *dtype_and_format = PyTuple_Pack(2, dtype, memory_format);
};

// Made when the module is: a thread that waited here for another one would hold the GIL.
inline const Names &names() {
    static const Names n;
    return n;
}

// unchanged([(dict, key, value), ...], [(tensor, stamp), ...]): whether each dict still holds that very
// object under the key, and each stamp still holds.
bool is_unchanged(PyObject *seen, PyObject *stamps);

} // namespace tautorch::bindings
