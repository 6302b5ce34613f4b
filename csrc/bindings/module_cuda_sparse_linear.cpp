// tautorch._cuda: sparse_linear, pattern 2:4.
#include "kernels/sparse_linear/sparse_linear_cuda.h"

#include "bindings/module_cuda.h"

#include <algorithm>
#include <iterator>

namespace tautorch::bindings {
namespace {

using cuda::SparseLinearKernel;

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
    int rows = 0;
    const SparseLinearKernel *table = cuda::sparse_linear_kernels(&rows);
    const SparseLinearKernel *kernel = index >= 0 && index < rows
                                           ? table + index
                                           : cuda::sparse_linear_choose(facts.multiprocessors, a.m, a.n);
    if (cuda::sparse_linear_supports(facts.capability, a.m, a.n, a.k) != nullptr)
        fail("sparse_linear", cuda::kNoKernel);
    if (a.m == 0)
        return kernel - table;
    const Operand operand = prepare_rows({x, x_dtype, a.m, a.k, stride_m, stride_k}, p.mode, a.x_scale,
                                         a.x_zero_point, workspace, stream);
    a.x = operand.x;
    a.ldx = operand.ldx;
    a.x_dtype = DType::i8;
    if (operand.scale != nullptr) {
        a.x_scale = operand.scale;
        a.x_scale_per_row = true;
    }
    check("sparse_linear", cuda::sparse_linear_run(*kernel, a, stream));
    return kernel - table;
}

PyMethodDef kRun = {"sparse_linear_run", as_function(&launched<run>), METH_FASTCALL,
                    "sparse_linear_run(plan, kernel, x, x_dtype, m, stride_m, stride_k, y, ldy, y_dtype, "
                    "workspace, device, stream) -> kernel"};

} // namespace

void bind_sparse_linear_cuda(py::module_ &m) {
    m.def("sparse_linear_kernels", [] { return names_of(&cuda::sparse_linear_kernels); });
    m.def("sparse_linear_supports", [](int capability, int64_t rows, int64_t n, int64_t k) {
        const char *why = cuda::sparse_linear_supports(capability, rows, n, k);
        return why ? py::object(py::str(why)) : py::none();
    });
    m.def("sparse_linear_choose", [](int multiprocessors, int64_t rows, int64_t n) {
        return cuda::sparse_linear_choose(std::max(multiprocessors, 1), rows, n)->name;
    });
    m.def("sparse_linear_layout", [](int64_t n, int64_t k) {
        const cuda::GemmLayout l = cuda::gemm_layout(n, k, cuda::kSparseUnit);
        py::dict d;
        d["sums_off"] = l.sums_off;
        d["total"] = l.total;
        return d;
    });
    m.def("sparse_linear_pack", [](int64_t values, int64_t places, int64_t n, int64_t kept, int64_t packed,
                                   int device, int64_t stream) {
        const py::gil_scoped_release release;
        const DeviceGuard guard(device);
        const cuda::GemmLayout l = cuda::gemm_layout(n, 2 * kept, cuda::kSparseUnit);
        const auto *from = at<const int8_t>(values);
        check("sparse_linear: packing", cuda::gemm_pack_sparse(from, at<const uint8_t>(places), n, kept,
                                                               at<uint8_t>(packed), at<void>(stream)));
        check(
            "sparse_linear: summing",
            cuda::int8_linear_sums(from, kept, n, kept, at<int32_t>(packed + l.sums_off), at<void>(stream)));
    });
    m.def("sparse_linear_plan", [](int64_t packed, int64_t n, int64_t k, const py::dict &tail) {
        CudaPlan<cuda::Int8Linear> p{};
        p.args.n = n;
        p.args.k = k;
        p.args.weight = at<const int8_t>(packed);
        // The units are the same for K and K rounded up as the layout of 2:4 rounds it: to whole steps.
        p.args.sums = at<const int32_t>(packed + cuda::gemm_layout(n, k, cuda::kSparseUnit).sums_off);
        fill_plan(p, tail);
        p.args.x_scale_per_row = tail["x_scales"].cast<int64_t>() > 1;
        if (p.mode == ActQuant::none)
            throw py::value_error(
                "sparse_linear: the CUDA kernels quantise x; weight-only products do not run there");
        return as_plan(p);
    });
    PyModule_AddObject(m.ptr(), kRun.ml_name, PyCFunction_New(&kRun, nullptr));
}

} // namespace tautorch::bindings
