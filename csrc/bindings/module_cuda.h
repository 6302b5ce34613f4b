// What the operators' CUDA bindings share: errors, devices, plans of linear layers, and x as the kernels read
// it.
#pragma once

#include "bindings/call.h"
#include "kernels/common/quantize_rows_cuda.h"
#include "kernels/int8_linear/int8_linear_cuda.h"

#include <cuda_runtime_api.h>

namespace tautorch::bindings {

// ---- errors, devices ----

[[noreturn]] inline void fail(const char *what, int status) {
    std::string text = std::string(what) + ": ";
    switch (status) {
    case cuda::kBadArgument:
        text += "a size, stride, alignment or dtype is outside the kernel's contract";
        break;
    case cuda::kNoKernel:
        text += "no kernel can run this on this device";
        break;
    case cuda::kNoTensorMap:
        text += "the driver has no cuTensorMapEncodeTiled; update it to 580 or newer";
        break;
    case cuda::kCutlassRefused:
        text += "CUTLASS refused the problem";
        break;
    default:
        text += cudaGetErrorString(static_cast<cudaError_t>(status));
    }
    if (status == cuda::kBadArgument)
        throw py::value_error(text);
    throw std::runtime_error(text);
}

inline void check(const char *what, int status) {
    if (status != cuda::kOk)
        fail(what, status);
}

// Makes `device` current for a scope.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check("cudaGetDevice", static_cast<int>(cudaGetDevice(&previous_)));
        if (device != previous_) {
            check("cudaSetDevice", static_cast<int>(cudaSetDevice(device)));
            changed_ = true;
        }
    }
    ~DeviceGuard() {
        if (changed_)
            cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

struct DeviceFacts {
    int capability, multiprocessors;
};

// Asked of the driver once per device and thread.
inline DeviceFacts facts_of(int device) {
    constexpr int kDevices = 64;
    thread_local DeviceFacts known[kDevices] = {};
    if (device < 0 || device >= kDevices)
        throw py::value_error("device must be 0.." + std::to_string(kDevices - 1) + ", got " +
                              std::to_string(device));
    DeviceFacts &f = known[device];
    if (f.capability == 0) {
        int major = 0, minor = 0, count = 0;
        const auto ask = [&](int *to, cudaDeviceAttr what) {
            check("cudaDeviceGetAttribute", static_cast<int>(cudaDeviceGetAttribute(to, what, device)));
        };
        ask(&major, cudaDevAttrComputeCapabilityMajor);
        ask(&minor, cudaDevAttrComputeCapabilityMinor);
        ask(&count, cudaDevAttrMultiProcessorCount);
        f = {major * 10 + minor, count};
    }
    return f;
}

// ---- plans ----

// What does not change from call to call. Holds addresses: whoever keeps it keeps the tensors alive. `Args`
// is an operator's arguments, with the names that the linear operators and the convolutions share.
template <class Args> struct CudaPlan {
    Args args;
    ActQuant::Mode mode; // given: x comes as int8; none: it is multiplied as it comes
};

// What the tail says of args, but for the scales of x.
template <class Args> void fill_plan(CudaPlan<Args> &p, const py::dict &tail) {
    const auto integer = [&](const char *key) { return tail[key].cast<int64_t>(); };
    p.args.w_scale = at<const float>(integer("weight_scale"));
    p.args.bias = at<const float>(integer("bias"));
    p.args.activation = static_cast<Activation>(integer("activation"));
    p.args.x_scale = at<const float>(integer("x_scale"));
    p.args.x_zero_point = at<const int32_t>(integer("x_zero_point"));
    p.args.out_scale = at<const float>(integer("out_scale"));
    p.args.out_zero_point = at<const int32_t>(integer("out_zero_point"));
    p.mode = static_cast<ActQuant::Mode>(integer("mode"));
}

// ---- x ----

// Rows of x where and as the caller has them; strides in elements.
struct Rows {
    const void *x;
    DType dtype;
    int64_t m, k, stride_m, stride_k;
};

// Rows as the kernel reads them, then one scale per row; `size` bytes an element.
struct Workspace {
    int64_t ldq, scale_off, bytes;
};

inline Workspace workspace_of(int64_t m, int64_t k, int64_t size) {
    Workspace w{};
    w.ldq = round_up(k, 16);
    w.scale_off = round_up(m * w.ldq * size, cuda::kLine);
    w.bytes = w.scale_off + round_up(m * 4, cuda::kLine);
    return w;
}

// Whether the kernels can read the rows where they are.
inline bool readable(const Rows &r) {
    const int64_t size = size_of(r.dtype);
    return r.stride_k == 1 && r.stride_m >= r.k && r.stride_m * size % 16 == 0 && cuda::is_aligned(r.x, 16);
}

// Rows for a kernel: x itself, copied or quantised into the workspace.
struct Operand {
    const void *x;
    int64_t ldx;
    const float *scale; // one a row if the rows were quantised here, else null
};

inline Operand prepare_rows(const Rows &r, ActQuant::Mode mode, const float *x_scale,
                            const int32_t *zero_point, uint8_t *workspace, cudaStream_t stream,
                            uint32_t *peaks = nullptr) {
    const bool as_it_is = mode == ActQuant::none || mode == ActQuant::given;
    if (as_it_is && readable(r))
        return {r.x, r.stride_m, nullptr};
    const int64_t size = as_it_is ? size_of(r.dtype) : 1;
    const Workspace w = workspace_of(r.m, r.k, size);
    if (as_it_is) {
        check("copying x", static_cast<int>(cudaMemcpy2DAsync(
                               workspace, static_cast<size_t>(w.ldq * size), r.x,
                               static_cast<size_t>(r.stride_m * size), static_cast<size_t>(r.k * size),
                               static_cast<size_t>(r.m), cudaMemcpyDeviceToDevice, stream)));
        return {workspace, w.ldq, nullptr};
    }
    auto *scale = reinterpret_cast<float *>(workspace + w.scale_off);
    const cuda::QuantizeRows q{r.x,        r.dtype,    r.stride_m,
                               r.stride_k, r.m,        r.k,
                               x_scale,    zero_point, reinterpret_cast<int8_t *>(workspace),
                               w.ldq,      scale,      peaks};
    check("quantize_rows", cuda::quantize_rows(q, stream));
    // Static too has one scale per row by now: NaN marks the poisoned ones.
    return {workspace, w.ldq, scale};
}

// ---- linear operators ----

// What a call of a linear operator has besides its plan.
struct LinearCall {
    CudaPlan<cuda::Int8Linear> plan;
    int64_t kernel; // an index into the table; -1: choose
    Rows rows;
    DType y_dtype;
    void *y;
    int64_t ldy;
    uint8_t *workspace;
    int device;
    cudaStream_t stream;

    bool weight_only() const { return plan.mode == ActQuant::none; }
    // Of the workspace, before what the kernel wants of it.
    int64_t rows_bytes() const {
        const bool as_it_is = weight_only() || rows.dtype == DType::i8;
        if (as_it_is && rows.stride_k != 1 && rows.k > 1)
            throw py::value_error("x must have adjacent elements in a row");
        if (as_it_is && readable(rows))
            return 0;
        return workspace_of(rows.m, rows.k, as_it_is ? size_of(rows.dtype) : 1).bytes;
    }
    // The arguments without x, for a kernel that is still to be chosen.
    cuda::Int8Linear arguments() const {
        cuda::Int8Linear a = plan.args;
        a.m = rows.m;
        a.x_dtype = weight_only() ? rows.dtype : DType::i8;
        a.y = y;
        a.ldy = ldy;
        a.out_dtype = y_dtype;
        return a;
    }
    // x, quantised or copied where it must be, and the rest of the workspace.
    void prepare(cuda::Int8Linear &a, int64_t kernel_bytes) const {
        const Operand x =
            prepare_rows(rows, plan.mode, plan.args.x_scale, plan.args.x_zero_point, workspace, stream);
        a.x = x.x;
        a.ldx = x.ldx;
        if (x.scale != nullptr) {
            a.x_scale = x.scale;
            a.x_scale_per_row = true;
        }
        a.workspace = workspace + rows_bytes();
        a.workspace_bytes = kernel_bytes;
    }
};

// plan, kernel index, x, x dtype, m, stride_m, stride_k, y dtype, device: what <op>_workspace() takes, and
// the beginning of what <op>_run() does.
inline LinearCall linear_call(Args &in) {
    LinearCall c{};
    c.plan = in.plan<CudaPlan<cuda::Int8Linear>>();
    c.kernel = in.integer();
    c.rows.x = in.pointer<const void>();
    c.rows.dtype = static_cast<DType>(in.integer());
    c.rows.m = in.integer();
    c.rows.k = c.plan.args.k;
    c.rows.stride_m = in.integer();
    c.rows.stride_k = in.integer();
    c.y_dtype = static_cast<DType>(in.integer());
    c.device = static_cast<int>(in.integer());
    return c;
}

// Op: kName, Kernel, table(int *), choose(facts, args), supports(kernel, facts, args), workspace(kernel,
// args, device), run(kernel, args, stream).
template <class Op>
const typename Op::Kernel *named_or_chosen(const LinearCall &c, const cuda::Int8Linear &a) {
    int rows = 0;
    const typename Op::Kernel *table = Op::table(&rows);
    return c.kernel >= 0 && c.kernel < rows ? table + c.kernel : Op::choose(facts_of(c.device), a);
}

// Bytes that the caller allocates, on 128.
template <class Op> int64_t linear_workspace(Args &in) {
    const LinearCall c = linear_call(in);
    in.done();
    const cuda::Int8Linear a = c.arguments();
    const typename Op::Kernel *kernel = named_or_chosen<Op>(c, a);
    if (kernel == nullptr)
        fail(Op::kName, cuda::kNoKernel);
    return c.rows_bytes() + Op::workspace(*kernel, a, c.device);
}

// -> index of the kernel that was launched.
template <class Op> int64_t linear_run(Args &in) {
    LinearCall c = linear_call(in);
    c.y = in.pointer<void>();
    c.ldy = in.integer();
    c.workspace = in.pointer<uint8_t>();
    c.stream = static_cast<cudaStream_t>(in.pointer<void>());
    in.done();

    const py::gil_scoped_release release;
    const DeviceGuard guard(c.device);
    cuda::Int8Linear a = c.arguments();
    const typename Op::Kernel *kernel = named_or_chosen<Op>(c, a);
    if (kernel == nullptr || Op::supports(*kernel, facts_of(c.device), a) != nullptr)
        fail(Op::kName, cuda::kNoKernel);
    if (a.m > 0) {
        c.prepare(a, Op::workspace(*kernel, a, c.device));
        check(Op::kName, Op::run(*kernel, a, c.stream));
    }
    int rows = 0;
    return kernel - Op::table(&rows);
}

// Wraps int64_t f(Args &) as a METH_FASTCALL function.
template <int64_t (*F)(Args &)> PyObject *launched(PyObject *, PyObject *const *args, Py_ssize_t n) {
    return guarded([&] {
        Args a(args, n);
        return PyLong_FromLongLong(F(a));
    });
}

template <class Op> void bind_linear(py::module_ &m) {
    static const std::string name = Op::kName;
    static const std::string run = name + "_run", workspace = name + "_workspace";
    static const char *doc = "(plan, kernel, x, x_dtype, m, stride_m, stride_k, y_dtype, device[, y, ldy, "
                             "workspace, stream])";
    static PyMethodDef methods[] = {
        {run.c_str(), as_function(&launched<linear_run<Op>>), METH_FASTCALL, doc},
        {workspace.c_str(), as_function(&launched<linear_workspace<Op>>), METH_FASTCALL, doc}};
    for (PyMethodDef &method : methods)
        PyModule_AddObject(m.ptr(), method.ml_name, PyCFunction_New(&method, nullptr));
}

// Names of a table's rows.
template <class Kernel> py::list names_of(const Kernel *(*table)(int *)) {
    int rows = 0;
    const Kernel *kernels = table(&rows);
    py::list names;
    for (int i = 0; i < rows; ++i)
        names.append(kernels[i].name);
    return names;
}

void bind_int8_linear_cuda(py::module_ &m);
void bind_sparse_linear_cuda(py::module_ &m);
void bind_int8_conv2d_cuda(py::module_ &m);
void bind_sparse_conv2d_cuda(py::module_ &m);

} // namespace tautorch::bindings
