// How the hot entry points are called: METH_FASTCALL functions that take integers. pybind11's own argument
// conversion costs about 50 ns an argument, which a 64 x 64 layer would notice.
#pragma once

#include <pybind11/pybind11.h>

#include "checks/plan.h"

#include <cstring>
#include <new>
#include <string>

namespace tautorch::bindings {

namespace py = pybind11;

// Reads integer arguments one after another.
class Args {
  public:
    Args(PyObject *const *args, Py_ssize_t n) : args_(args), n_(n) {}
    int64_t integer() {
        if (i_ >= n_)
            throw py::type_error("too few arguments");
        const long long v = PyLong_AsLongLong(args_[i_++]);
        if (v == -1 && PyErr_Occurred())
            throw py::error_already_set();
        return v;
    }
    template <class T> T *pointer() { return reinterpret_cast<T *>(static_cast<intptr_t>(integer())); }
    // A bytes object holding one T.
    template <class T> T plan() {
        if (i_ >= n_ || !PyBytes_Check(args_[i_]) || PyBytes_GET_SIZE(args_[i_]) != sizeof(T))
            throw py::type_error("argument is no plan of this function");
        T t;
        std::memcpy(static_cast<void *>(&t), PyBytes_AS_STRING(args_[i_++]), sizeof t);
        return t;
    }
    void done() const {
        if (i_ != n_)
            throw py::type_error("too many arguments");
    }

  private:
    PyObject *const *args_;
    Py_ssize_t n_, i_ = 0;
};

// What f gives back; an exception becomes Python's.
template <class F> PyObject *guarded(const F &f) {
    try {
        return f();
    } catch (py::error_already_set &e) {
        e.restore();
    } catch (const py::builtin_exception &e) {
        e.set_error();
    } catch (const std::bad_alloc &) {
        PyErr_NoMemory();
    } catch (const std::invalid_argument &e) {
        PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const std::exception &e) {
        PyErr_SetString(PyExc_RuntimeError, e.what());
    }
    return nullptr;
}

// As PyMethodDef takes a METH_FASTCALL function.
template <class F> PyCFunction as_function(F *f) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

// Wraps void f(Args &) as a METH_FASTCALL function.
template <void (*F)(Args &)> PyObject *fastcall(PyObject *, PyObject *const *args, Py_ssize_t n) {
    return guarded([&]() -> PyObject * {
        Args a(args, n);
        F(a);
        Py_RETURN_NONE;
    });
}

template <class T> py::bytes as_plan(const T &t) {
    return py::bytes(reinterpret_cast<const char *>(&t), sizeof t);
}

// Runs f without the GIL where it takes long enough for other threads to profit.
template <class F> void run_released(int64_t macs, const F &f) {
    if (macs < 100'000) {
        f();
    } else {
        py::gil_scoped_release release;
        f();
    }
}

template <class T> T *at(int64_t address) { return reinterpret_cast<T *>(static_cast<intptr_t>(address)); }

// Settings that every operator takes alike, from a Python dict of integers (addresses, 0 for none, and
// codes).
Tail tail_of(const py::dict &d);

// Kernel names by operator, for last_used(). `slot` comes from op_slot.
int op_slot(const char *op);
void note_used(int slot, const char *kernel);

void bind_recall(py::module_ &m);
void bind_eager(py::module_ &m);
void bind_pack(py::module_ &m);
void bind_int8_linear(py::module_ &m);
void bind_sparse_linear(py::module_ &m);
void bind_lowrank_linear(py::module_ &m);
void bind_int8_conv2d(py::module_ &m);
void bind_sparse_conv2d(py::module_ &m);
void bind_lowrank_conv2d(py::module_ &m);

} // namespace tautorch::bindings
