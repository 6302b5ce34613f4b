// tautorch._cuda: the CUDA kernels. Addresses, sizes, device ordinals and streams come as integers; nothing
// here allocates device memory or waits for the device. The CUDA runtime is linked statically and driver
// entry points are looked up when first needed, so that the module loads on a machine without a driver.
#include "bindings/module_cuda.h"

namespace tautorch::bindings {
namespace {

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

PyMethodDef kQuantizeRows = {"quantize_rows", as_function(&fastcall<quantize_rows>), METH_FASTCALL,
                             "quantize_rows(x, dtype, stride_m, stride_k, m, k, x_scale, zero_point, q, ldq, "
                             "scale, device, stream)"};

} // namespace
} // namespace tautorch::bindings

PYBIND11_MODULE(_cuda, m) {
    namespace py = pybind11;
    using namespace tautorch::bindings;
    namespace cuda = tautorch::cuda;
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
    m.attr("MAX_HELD") = cuda::kMaxHeld;
    m.def("quantize_rows_after",
          [](int64_t x, int dtype, int64_t stride_m, int64_t rows, int64_t k, int stage, int64_t weight,
             int64_t bias, int64_t gate, int64_t gate_stride_m, double eps, int64_t x_scale,
             int64_t zero_point, int64_t q, int64_t ldq, int64_t scale, int device, int64_t stream) {
              const cuda::QuantizeRows r{at<const void>(x),
                                         static_cast<tautorch::DType>(dtype),
                                         stride_m,
                                         1,
                                         rows,
                                         k,
                                         at<const float>(x_scale),
                                         at<const int32_t>(zero_point),
                                         at<int8_t>(q),
                                         ldq,
                                         at<float>(scale)};
              const py::gil_scoped_release release;
              const DeviceGuard guard(device);
              check("quantize_rows",
                    cuda::quantize_rows_after({r, static_cast<cuda::RowStage>(stage), at<const float>(weight),
                                               at<const float>(bias), at<const void>(gate), gate_stride_m,
                                               static_cast<float>(eps)},
                                              at<void>(stream)));
          });
    bind_int8_linear_cuda(m);
    bind_sparse_linear_cuda(m);
    bind_int8_conv2d_cuda(m);
    bind_sparse_conv2d_cuda(m);
}
