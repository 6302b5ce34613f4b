// tautorch._cuda: sparse_linear, pattern 2:4 and single weights.
#include "kernels/sparse_linear/sparse_linear_cuda.h"

#include "bindings/module_cuda.h"

#include <algorithm>

namespace tautorch::bindings {
namespace {

using cuda::SparseLinearKernel;

const SparseLinearKernel &sparse_linear_named(const std::string &name) {
    if (const SparseLinearKernel *k = cuda::sparse_linear_find(name.c_str()))
        return *k;
    throw py::value_error("sparse_linear: no CUDA kernel is called '" + name +
                          "'; see sparse_linear_kernels()");
}

struct Op {
    using Kernel = SparseLinearKernel;
    static constexpr const char *kName = "sparse_linear";
    static const Kernel *table(int *rows) { return cuda::sparse_linear_kernels(rows); }
    static const Kernel *choose(const DeviceFacts &f, const cuda::Int8Linear &a) {
        return cuda::sparse_linear_choose(f.capability, f.multiprocessors, a.m, a.n, a.k, a.x_dtype);
    }
    static const char *supports(const Kernel &k, const DeviceFacts &f, const cuda::Int8Linear &a) {
        return cuda::sparse_linear_supports(k, f.capability, a.m, a.n, a.k, a.x_dtype);
    }
    static int64_t workspace(const Kernel &, const cuda::Int8Linear &, int) { return 0; }
    static int run(const Kernel &k, const cuda::Int8Linear &a, void *stream) {
        return cuda::sparse_linear_run(k, a, stream);
    }
};

// A kernel's order, as Python has it: an integer.
cuda::SparseOrder order_of(int order) {
    if (order < 0 || order > 3)
        throw py::value_error("sparse_linear: order must be 0..3, got " + std::to_string(order));
    return static_cast<cuda::SparseOrder>(order);
}

// Where the sums are (of float values nothing uses them), and how long a pack is (of single weights without
// their values).
struct SparseLayout {
    int64_t sums_off, total;
};
SparseLayout layout_of(int64_t n, int64_t k, cuda::SparseOrder order) {
    if (order == cuda::SparseOrder::wgmma) {
        const cuda::WgmmaLayout l = cuda::wgmma_layout(n, k);
        return {l.sums_off, l.total};
    }
    if (order == cuda::SparseOrder::bitmap) {
        const cuda::BitmapLayout l = cuda::bitmap_layout(n, k);
        return {l.sums_off, l.values_off};
    }
    const bool floats = order == cuda::SparseOrder::float_units;
    const cuda::GemmLayout l = floats ? cuda::gemm_layout(n, 2 * k, cuda::kSparseFloatUnit)
                                      : cuda::gemm_layout(n, k, cuda::kSparseUnit);
    return {l.sums_off, l.total};
}

} // namespace

void bind_sparse_linear_cuda(py::module_ &m) {
    m.def("sparse_linear_kernels", [] { return names_of(&cuda::sparse_linear_kernels); });
    m.def("sparse_linear_supports",
          [](const std::string &kernel, int capability, int64_t rows, int64_t n, int64_t k, int x_dtype) {
              const char *why = cuda::sparse_linear_supports(sparse_linear_named(kernel), capability, rows, n,
                                                             k, static_cast<DType>(x_dtype));
              return why ? py::object(py::str(why)) : py::none();
          });
    m.def("sparse_linear_choose",
          [](int capability, int multiprocessors, int64_t rows, int64_t n, int64_t k, int x_dtype) {
              const SparseLinearKernel *best = cuda::sparse_linear_choose(
                  capability, std::max(multiprocessors, 1), rows, n, k, static_cast<DType>(x_dtype));
              return best ? py::object(py::str(best->name)) : py::none();
          });
    // In which order a kernel reads weights.
    m.def("sparse_linear_order",
          [](const std::string &kernel) { return static_cast<int>(sparse_linear_named(kernel).order); });
    m.def("sparse_linear_layout", [](int64_t n, int64_t k, int order) {
        const SparseLayout l = layout_of(n, k, order_of(order));
        py::dict d;
        d["sums_off"] = l.sums_off;
        d["total"] = l.total;
        return d;
    });
    m.def("sparse_linear_pack", [](int64_t values, int64_t places, int64_t n, int64_t kept, int64_t packed,
                                   int order, int device, int64_t stream) {
        const cuda::SparseOrder wanted = order_of(order);
        if (wanted == cuda::SparseOrder::bitmap)
            throw py::value_error("sparse_linear: single weights are packed by their caller");
        const py::gil_scoped_release release;
        const DeviceGuard guard(device);
        if (wanted == cuda::SparseOrder::float_units) {
            check("sparse_linear: packing",
                  cuda::gemm_pack_sparse_float(at<const uint16_t>(values), at<const uint8_t>(places), n, kept,
                                               at<uint8_t>(packed), at<void>(stream)));
            return;
        }
        const auto *from = at<const int8_t>(values);
        const auto pack =
            wanted == cuda::SparseOrder::wgmma ? &cuda::wgmma_pack_sparse : &cuda::gemm_pack_sparse;
        check("sparse_linear: packing",
              pack(from, at<const uint8_t>(places), n, kept, at<uint8_t>(packed), at<void>(stream)));
        const int64_t sums = packed + layout_of(n, 2 * kept, wanted).sums_off;
        check("sparse_linear: summing",
              cuda::int8_linear_sums(from, kept, n, kept, at<int32_t>(sums), at<void>(stream)));
    });
    // The kernel of single weights for a number of rows, and where the parts of its weights lie.
    m.def("sparse_linear_bitmap", [](int64_t rows) { return cuda::sparse_linear_bitmap(rows)->name; });
    m.def("sparse_linear_bitmap_layout", [](int64_t n, int64_t k) {
        const cuda::BitmapLayout l = cuda::bitmap_layout(n, k);
        py::dict d;
        d["tiles"] = l.tiles;
        d["steps"] = l.steps;
        d["offsets_off"] = l.offsets_off;
        d["sums_off"] = l.sums_off;
        d["values_off"] = l.values_off;
        return d;
    });
    m.def("sparse_linear_plan", [](int64_t packed, int64_t n, int64_t k, int order, const py::dict &tail) {
        CudaPlan<cuda::Int8Linear> p{};
        p.args.n = n;
        p.args.k = k;
        p.args.weight = at<const int8_t>(packed);
        // A layout is the same for K and K rounded up as 2:4 rounds it: to whole steps.
        p.args.sums = at<const int32_t>(packed + layout_of(n, k, order_of(order)).sums_off);
        fill_plan(p, tail);
        p.args.x_scale_per_row = tail["x_scales"].cast<int64_t>() > 1;
        if ((p.mode == ActQuant::none) != (order_of(order) == cuda::SparseOrder::float_units))
            throw py::value_error(
                "sparse_linear: the CUDA kernels multiply quantised x by int8 values and float "
                "x by float values; weight-only products do not run there");
        return as_plan(p);
    });
    bind_linear<Op>(m);
}

} // namespace tautorch::bindings
