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

// plan, kernel index (-1: choose), x, x dtype, m, stride_m, stride_k, y, ldy, y dtype, workspace, device,
// stream
// -> index of the kernel that was launched. The caller has allocated int8_linear_workspace() bytes.
int64_t run(Args &in) {
    const auto p = in.plan<CudaPlan<cuda::Int8Linear>>();
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
    const bool weight_only = p.mode == ActQuant::none;
    a.x_dtype = weight_only ? x_dtype : DType::i8;
    int rows = 0;
    const Int8LinearKernel *table = cuda::int8_linear_kernels(&rows);
    const Int8LinearKernel *kernel = index >= 0 && index < rows
                                         ? table + index
                                         : cuda::int8_linear_choose(facts.capability, facts.multiprocessors,
                                                                    a.m, a.n, a.k, weight_only, x_dtype);
    if (kernel == nullptr ||
        cuda::int8_linear_supports(*kernel, facts.capability, a.m, a.n, a.k, weight_only, x_dtype) != nullptr)
        fail("int8_linear", cuda::kNoKernel);
    if (a.m == 0)
        return kernel - table;
    const Operand rows_of_x = prepare_rows({x, x_dtype, a.m, a.k, stride_m, stride_k}, p.mode, a.x_scale,
                                           a.x_zero_point, workspace, stream);
    a.x = rows_of_x.x;
    a.ldx = rows_of_x.ldx;
    if (rows_of_x.scale != nullptr) {
        a.x_scale = rows_of_x.scale;
        a.x_scale_per_row = true;
    }
    check("int8_linear", cuda::int8_linear_run(*kernel, a, stream));
    return kernel - table;
}

PyMethodDef kRun = {"int8_linear_run", as_function(&launched<run>), METH_FASTCALL,
                    "int8_linear_run(plan, kernel, x, x_dtype, m, stride_m, stride_k, y, ldy, y_dtype, "
                    "workspace, device, stream) -> kernel"};
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
    m.def("int8_linear_workspace",
          [](int64_t x, int x_dtype, int64_t rows, int64_t k, int64_t stride_m, int64_t stride_k,
             bool weight_only) -> int64_t {
              const auto dtype = static_cast<DType>(x_dtype);
              const bool as_it_is = weight_only || dtype == DType::i8;
              if (as_it_is && stride_k != 1 && k > 1)
                  throw py::value_error("int8_linear: x must have adjacent elements in a row");
              const Rows r{at<const void>(x), dtype, rows, k, stride_m, stride_k};
              return as_it_is && readable(r) ? 0 : workspace_of(rows, k, as_it_is ? size_of(dtype) : 1).bytes;
          });
    PyModule_AddObject(m.ptr(), kRun.ml_name, PyCFunction_New(&kRun, nullptr));
}

} // namespace tautorch::bindings
