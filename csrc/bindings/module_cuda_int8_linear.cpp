// tautorch._cuda: int8_linear.
#include "bindings/module_cuda.h"

namespace tautorch::bindings {
namespace {

using cuda::Int8LinearKernel;

const Int8LinearKernel &int8_linear_named(const std::string &name) {
    if (const Int8LinearKernel *k = cuda::int8_linear_find(name.c_str()))
        return *k;
    throw py::value_error("int8_linear: no CUDA kernel is called '" + name + "'; see int8_linear_kernels()");
}

struct Op {
    using Kernel = Int8LinearKernel;
    static constexpr const char *kName = "int8_linear";
    static const Kernel *table(int *rows) { return cuda::int8_linear_kernels(rows); }
    static const Kernel *choose(const DeviceFacts &f, const cuda::Int8Linear &a) {
        return cuda::int8_linear_choose(f.capability, f.multiprocessors, a.m, a.n, a.k,
                                        a.x_dtype != DType::i8, a.x_dtype);
    }
    static const char *supports(const Kernel &k, const DeviceFacts &f, const cuda::Int8Linear &a) {
        return cuda::int8_linear_supports(k, f.capability, a.m, a.n, a.k, a.x_dtype != DType::i8, a.x_dtype);
    }
    static int64_t workspace(const Kernel &k, const cuda::Int8Linear &a, int device) {
        if (k.workspace == nullptr)
            return 0;
        return cuda::int8_linear_kernel_workspace(k, a, facts_of(device).multiprocessors);
    }
    static int run(const Kernel &k, const cuda::Int8Linear &a, void *stream) {
        return cuda::int8_linear_run(k, a, stream);
    }
};

py::bytes make_plan(int64_t weight, int64_t ldw, int64_t sums, int64_t n, int64_t k, const py::dict &tail) {
    CudaPlan<cuda::Int8Linear> p{};
    p.args.n = n;
    p.args.k = k;
    p.args.weight = at<const int8_t>(weight);
    p.args.ldw = ldw;
    p.args.sums = at<const int32_t>(sums);
    fill_plan(p, tail);
    p.args.x_scale_per_row = tail["x_scales"].cast<int64_t>() > 1;
    return as_plan(p);
}

} // namespace

void bind_int8_linear_cuda(py::module_ &m) {
    m.def("int8_linear_kernels", [] { return names_of(&cuda::int8_linear_kernels); });
    m.def("int8_linear_supports", [](const std::string &kernel, int capability, int64_t rows, int64_t n,
                                     int64_t k, bool weight_only, int x_dtype) {
        const char *why = cuda::int8_linear_supports(int8_linear_named(kernel), capability, rows, n, k,
                                                     weight_only, static_cast<DType>(x_dtype));
        return why ? py::object(py::str(why)) : py::none();
    });
    m.def("int8_linear_choose", [](int capability, int multiprocessors, int64_t rows, int64_t n, int64_t k,
                                   bool weight_only, int x_dtype) {
        if (multiprocessors < 1)
            throw py::value_error("int8_linear: multiprocessors must be at least 1, got " +
                                  std::to_string(multiprocessors));
        const Int8LinearKernel *best = cuda::int8_linear_choose(capability, multiprocessors, rows, n, k,
                                                                weight_only, static_cast<DType>(x_dtype));
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
    // What a kernel wants for itself.
    m.def("int8_linear_kernel_workspace", [](const std::string &kernel, int multiprocessors, int64_t rows,
                                             int64_t n, int64_t k, int out_dtype) {
        cuda::Int8Linear a{};
        a.m = rows;
        a.n = n;
        a.k = k;
        a.out_dtype = static_cast<DType>(out_dtype);
        return cuda::int8_linear_kernel_workspace(int8_linear_named(kernel), a, multiprocessors);
    });
    bind_linear<Op>(m);
}

} // namespace tautorch::bindings
