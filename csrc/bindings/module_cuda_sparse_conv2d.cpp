// tautorch._cuda: sparse_conv2d, pattern 2:4.
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

#include "bindings/module_cuda_conv2d.h"

namespace tautorch::bindings {
namespace {

struct Op {
    static constexpr const char *kName = "sparse_conv2d";
    static constexpr int64_t kUnit = cuda::kSparseUnit;
    static constexpr auto kernels = &cuda::sparse_conv2d_kernels;
    static constexpr auto supports = &cuda::sparse_conv2d_supports;
    static constexpr auto choose = &cuda::sparse_conv2d_choose;
};

} // namespace

// Packs are sparse_linear's, in units.
void bind_sparse_conv2d_cuda(py::module_ &m) { bind_conv<Op>(m); }

} // namespace tautorch::bindings
