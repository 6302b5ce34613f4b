// tautorch._cuda: the CUDA kernels. Addresses, sizes, device ordinals and streams come as integers; nothing
// here allocates device memory or waits for the device. The CUDA runtime is linked statically and driver
// entry points are looked up when first needed, so that the module loads on a machine without a driver.
#include "bindings/call.h"
#include "kernels/common/quantize_rows_cuda.h"
#include "kernels/int8_linear/int8_linear_cuda.h"

#include <cuda_runtime_api.h>

namespace tautorch::bindings {
namespace {

using cuda::Int8LinearKernel;

// ---- errors, devices ----

[[noreturn]] void fail(const char *what, int status) {
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

void check(const char *what, int status) {
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
DeviceFacts facts_of(int device) {
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

const Int8LinearKernel &int8_linear_named(const std::string &name) {
    if (const Int8LinearKernel *k = cuda::int8_linear_find(name.c_str()))
        return *k;
    throw py::value_error("int8_linear: no CUDA kernel is called '" + name + "'; see int8_linear_kernels()");
}

// ---- quantize_rows ----

// x, dtype, stride_m, stride_k, m, k, x_scale, zero_point, q, ldq, scale, device, stream
void quantize_rows(Args &args) {
    cuda::QuantizeRows a;
    a.x = args.pointer<const void>();
    a.dtype = static_cast<DType>(args.integer());
    a.stride_m = args.integer();
    a.stride_k = args.integer();
    a.m = args.integer();
    a.k = args.integer();
    a.x_scale = args.pointer<const float>();
    a.zero_point = args.pointer<const int32_t>();
    a.q = args.pointer<int8_t>();
    a.ldq = args.integer();
    a.scale = args.pointer<float>();
    const int device = static_cast<int>(args.integer());
    void *stream = args.pointer<void>();
    args.done();
    int status;
    {
        py::gil_scoped_release release;
        const DeviceGuard guard(device);
        status = cuda::quantize_rows(a, stream);
    }
    check("quantize_rows", status);
}

// ---- int8_linear ----

// What does not change from call to call. Holds addresses: whoever keeps it keeps the tensors alive.
struct Plan {
    cuda::Int8Linear args;
    bool given; // x comes as int8
};

// Quantised rows, then one scale per row.
struct Workspace {
    int64_t ldq, scale_off, bytes;
};

Workspace workspace_of(int64_t m, int64_t k) {
    Workspace w{};
    w.ldq = round_up(k, 16);
    w.scale_off = round_up(m * w.ldq, cuda::kLine);
    w.bytes = w.scale_off + round_up(m * 4, cuda::kLine);
    return w;
}

// int8 rows that the kernel can read where they are.
bool readable(const void *x, int64_t stride_m, int64_t stride_k, int64_t k) {
    return stride_k == 1 && stride_m >= k && stride_m % 16 == 0 && cuda::is_aligned(x, 16);
}

// plan, kernel index (-1: choose), x, x dtype, m, stride_m, stride_k, y, ldy, y dtype, workspace, device,
// stream
// -> index of the kernel that was launched. The caller has allocated int8_linear_workspace() bytes.
int64_t run(Args &in) {
    const Plan p = in.plan<Plan>();
    cuda::Int8Linear a = p.args;
    const int64_t index = in.integer();
    const void *x = in.pointer<const void>();
    const auto x_dtype = static_cast<DType>(in.integer());
    a.m = in.integer();
    const int64_t stride_m = in.integer(), stride_k = in.integer();
    a.y = in.pointer<void>();
    a.ldy = in.integer();
    a.out_dtype = static_cast<DType>(in.integer());
    auto *workspace = in.pointer<uint8_t>();
    const int device = static_cast<int>(in.integer());
    const auto stream = static_cast<cudaStream_t>(in.pointer<void>());
    in.done();

    const py::gil_scoped_release release;
    const DeviceGuard guard(device);
    const DeviceFacts facts = facts_of(device);
    int rows = 0;
    const Int8LinearKernel *table = cuda::int8_linear_kernels(&rows);
    const Int8LinearKernel *kernel =
        index >= 0 && index < rows
            ? table + index
            : cuda::int8_linear_choose(facts.capability, facts.multiprocessors, a.m, a.n, a.k);
    if (kernel == nullptr || cuda::int8_linear_supports(*kernel, facts.capability, a.m, a.n, a.k) != nullptr)
        fail("int8_linear", cuda::kNoKernel);
    if (a.m == 0)
        return kernel - table;

    const Workspace w = workspace_of(a.m, a.k);
    a.ldx = w.ldq;
    a.x = reinterpret_cast<const int8_t *>(workspace);
    if (!p.given) {
        auto *scale = reinterpret_cast<float *>(workspace + w.scale_off);
        const cuda::QuantizeRows q{x,
                                   x_dtype,
                                   stride_m,
                                   stride_k,
                                   a.m,
                                   a.k,
                                   a.x_scale,
                                   a.x_zero_point,
                                   reinterpret_cast<int8_t *>(workspace),
                                   w.ldq,
                                   scale};
        check("quantize_rows", cuda::quantize_rows(q, stream));
        // Static too has one scale per row by now: NaN marks the poisoned ones.
        a.x_scale = scale;
        a.x_scale_per_row = true;
    } else if (readable(x, stride_m, stride_k, a.k)) {
        a.x = static_cast<const int8_t *>(x);
        a.ldx = stride_m;
    } else {
        check("int8_linear: copying x",
              static_cast<int>(cudaMemcpy2DAsync(workspace, w.ldq, x, stride_m, a.k, a.m,
                                                 cudaMemcpyDeviceToDevice, stream)));
    }
    check("int8_linear", cuda::int8_linear_run(*kernel, a, stream));
    return kernel - table;
}

PyObject *run_call(PyObject *, PyObject *const *args, Py_ssize_t n) {
    return guarded([&] {
        Args a(args, n);
        return PyLong_FromLongLong(run(a));
    });
}

PyMethodDef kRun = {"int8_linear_run", as_function(&run_call), METH_FASTCALL,
                    "int8_linear_run(plan, kernel, x, x_dtype, m, stride_m, stride_k, y, ldy, y_dtype, "
                    "workspace, device, stream) -> kernel"};
PyMethodDef kQuantizeRows = {"quantize_rows", as_function(&fastcall<quantize_rows>), METH_FASTCALL,
                             "quantize_rows(x, dtype, stride_m, stride_k, m, k, x_scale, zero_point, q, ldq, "
                             "scale, device, stream)"};

py::bytes make_plan(int64_t weight, int64_t ldw, int64_t sums, int64_t n, int64_t k, const py::dict &tail) {
    const auto integer = [&](const char *key) { return tail[key].cast<int64_t>(); };
    Plan p{};
    p.args.n = n;
    p.args.k = k;
    p.args.weight = at<const int8_t>(weight);
    p.args.ldw = ldw;
    p.args.sums = at<const int32_t>(sums);
    p.args.w_scale = at<const float>(integer("weight_scale"));
    p.args.bias = at<const float>(integer("bias"));
    p.args.activation = static_cast<Activation>(integer("activation"));
    p.args.x_scale = at<const float>(integer("x_scale"));
    p.args.x_scale_per_row = integer("x_scales") > 1;
    p.args.x_zero_point = at<const int32_t>(integer("x_zero_point"));
    p.args.out_scale = at<const float>(integer("out_scale"));
    p.args.out_zero_point = at<const int32_t>(integer("out_zero_point"));
    const auto mode = static_cast<ActQuant::Mode>(integer("mode"));
    if (mode == ActQuant::none)
        throw py::value_error("int8_linear: the CUDA kernels quantise x; weight-only products run in Triton");
    p.given = mode == ActQuant::given;
    return as_plan(p);
}

} // namespace

void bind_int8_linear_cuda(py::module_ &m) {
    m.def("int8_linear_kernels", [] {
        int rows = 0;
        const Int8LinearKernel *table = cuda::int8_linear_kernels(&rows);
        py::list names;
        for (int i = 0; i < rows; ++i)
            names.append(table[i].name);
        return names;
    });
    m.def("int8_linear_supports",
          [](const std::string &kernel, int capability, int64_t rows, int64_t n, int64_t k) {
              const char *why = cuda::int8_linear_supports(int8_linear_named(kernel), capability, rows, n, k);
              return why ? py::object(py::str(why)) : py::none();
          });
    m.def("int8_linear_choose", [](int capability, int multiprocessors, int64_t rows, int64_t n, int64_t k) {
        if (multiprocessors < 1)
            throw py::value_error("int8_linear: multiprocessors must be at least 1, got " +
                                  std::to_string(multiprocessors));
        const Int8LinearKernel *best = cuda::int8_linear_choose(capability, multiprocessors, rows, n, k);
        return best ? py::object(py::str(best->name)) : py::none();
    });
    m.def("int8_linear_layout", [](int64_t n, int64_t k) {
        const cuda::PackHeader h = cuda::pack_header(n, k);
        py::dict d;
        d["magic"] = h.magic;
        d["version"] = h.version;
        d["ldw"] = h.ldw;
        d["weight_off"] = h.weight_off;
        d["sums_off"] = h.sums_off;
        d["total"] = h.total;
        return d;
    });
    m.def("int8_linear_pack", [](int64_t weight, int64_t stride_n, int64_t n, int64_t k, int64_t out,
                                 int device, int64_t stream) {
        const py::gil_scoped_release release;
        const DeviceGuard guard(device);
        check("int8_linear: packing", cuda::int8_linear_pack(at<const int8_t>(weight), stride_n, n, k,
                                                             at<uint8_t>(out), at<void>(stream)));
    });
    m.def("int8_linear_sums", [](int64_t weight, int64_t stride_n, int64_t n, int64_t k, int64_t sums,
                                 int device, int64_t stream) {
        const py::gil_scoped_release release;
        const DeviceGuard guard(device);
        check("int8_linear: summing", cuda::int8_linear_sums(at<const int8_t>(weight), stride_n, n, k,
                                                             at<int32_t>(sums), at<void>(stream)));
    });
    m.def("int8_linear_plan", &make_plan);
    m.def("int8_linear_workspace",
          [](int64_t x, int x_dtype, int64_t rows, int64_t k, int64_t stride_m, int64_t stride_k) -> int64_t {
              const bool given = static_cast<DType>(x_dtype) == DType::i8;
              if (given && stride_k != 1 && k > 1)
                  throw py::value_error("int8_linear: int8 x must have adjacent elements in a row");
              return given && readable(at<const void>(x), stride_m, stride_k, k)
                         ? 0
                         : workspace_of(rows, k).bytes;
          });
    PyModule_AddObject(m.ptr(), kRun.ml_name, PyCFunction_New(&kRun, nullptr));
}

} // namespace tautorch::bindings

PYBIND11_MODULE(_cuda, m) {
    namespace py = pybind11;
    using namespace tautorch::bindings;
    m.doc() =
        "CUDA kernels. Addresses are integers (Tensor.data_ptr()); whoever calls keeps the memory alive.";
    m.def("runtime_version", [] {
        int version = 0;
        check("cudaRuntimeGetVersion", static_cast<int>(cudaRuntimeGetVersion(&version)));
        return version;
    });
    m.def("driver_version", [] {
        int version = 0; // 0 without a driver
        cudaDriverGetVersion(&version);
        return version;
    });
    PyModule_AddObject(m.ptr(), kQuantizeRows.ml_name, PyCFunction_New(&kQuantizeRows, nullptr));
    bind_int8_linear_cuda(m);
}
