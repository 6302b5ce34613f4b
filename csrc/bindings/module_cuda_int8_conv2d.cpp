// tautorch._cuda: int8_conv2d.
#include "bindings/module_cuda_conv2d.h"

namespace tautorch::bindings {
namespace {

struct Op {
    static constexpr const char *kName = "int8_conv2d";
    static constexpr int64_t kUnit = cuda::kDenseUnit;
    static constexpr auto kernels = &cuda::int8_conv2d_kernels;
    static constexpr auto supports = &cuda::int8_conv2d_supports;
    static constexpr auto choose = &cuda::int8_conv2d_choose;
};

} // namespace

void bind_int8_conv2d_cuda(py::module_ &m) {
    bind_conv<Op>(m);
    // weight: [outputs, k] with k over taps, then channels.
    m.def("int8_conv2d_pack",
          [](int64_t weight, int64_t outputs, int64_t k, int64_t packed, int device, int64_t stream) {
              const py::gil_scoped_release release;
              const DeviceGuard guard(device);
              const cuda::GemmLayout l = cuda::gemm_layout(outputs, k, cuda::kDenseUnit);
              const auto *from = at<const int8_t>(weight);
              check("int8_conv2d: packing",
                    cuda::gemm_pack_dense(from, k, outputs, k, at<uint8_t>(packed), at<void>(stream)));
              check("int8_conv2d: summing",
                    cuda::int8_linear_sums(from, k, outputs, k, at<int32_t>(packed + l.sums_off),
                                           at<void>(stream)));
          });
}

} // namespace tautorch::bindings
