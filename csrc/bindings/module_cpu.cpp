// tautorch._C: the CPU kernels. Takes addresses and sizes as integers; links neither torch nor OpenMP.
#include "bindings/call.h"
#include "core/arch.h"
#include "core/parallel.h"

#include <array>
#include <atomic>

namespace tautorch::bindings {
namespace {

constexpr std::array<const char *, 6> kOps = {"int8_linear", "sparse_linear", "lowrank_linear",
                                              "int8_conv2d", "sparse_conv2d", "lowrank_conv2d"};
std::array<std::atomic<const char *>, kOps.size()> last_used_kernel;

} // namespace

int op_slot(const char *op) {
    for (size_t i = 0; i < kOps.size(); ++i)
        if (std::strcmp(kOps[i], op) == 0)
            return static_cast<int>(i);
    throw py::value_error(std::string("unknown operator ") + op);
}

void note_used(int slot, const char *kernel) {
    last_used_kernel[static_cast<size_t>(slot)].store(kernel, std::memory_order_relaxed);
}

Tail tail_of(const py::dict &d) {
    const auto integer = [&d](const char *key) { return d[key].cast<int64_t>(); };
    Tail t;
    t.weight_scale = at<const float>(integer("weight_scale"));
    t.weight_scales = integer("weight_scales");
    t.bias = at<const float>(integer("bias"));
    t.biases = integer("biases");
    t.activation = integer("activation");
    t.out_scale = at<const float>(integer("out_scale"));
    t.out_zero_point = at<const int32_t>(integer("out_zero_point"));
    t.mode = integer("mode");
    t.x_scale = at<const float>(integer("x_scale"));
    t.x_scales = integer("x_scales");
    t.x_zero_point = at<const int32_t>(integer("x_zero_point"));
    return t;
}

} // namespace tautorch::bindings

PYBIND11_MODULE(_C, m) {
    using namespace tautorch;
    namespace b = tautorch::bindings;
    m.doc() = "CPU kernels of tautorch; see csrc/kernels/<op>/<op>.h for each operator's contract.";
    m.def("isas", [] {
        pybind11::dict d;
        int n = 0;
        const IsaEntry *t = isa_table(&n);
        for (int i = n - 1; i >= 0; --i)
            d[t[i].isa->name] = t[i].supported;
        return d;
    });
    m.def("set_thread_pool", [](int64_t parallel_for, int64_t num_threads) {
        set_thread_pool(reinterpret_cast<ParallelForFn>(parallel_for),
                        reinterpret_cast<NumThreadsFn>(num_threads));
    });
    m.def("max_threads", &max_threads);
    m.def("scratch_allocations", &scratch_allocations);
    // n tasks of nothing, for measuring the cost of a fork-join.
    m.def("fork_join", [](int64_t repeats, int64_t tasks) {
        for (int64_t i = 0; i < repeats; ++i)
            parallel_tasks(tasks, [](int64_t) {});
    });
    // Reads one word of every cache line of [address, address + bytes), the pool's threads a part each: what
    // memory can deliver, for benches. Returns their sum.
    m.def("read_lines", [](int64_t address, int64_t bytes) {
        if (bytes < 0)
            throw pybind11::value_error("read_lines: bytes must not be negative, got " +
                                        std::to_string(bytes));
        return read_lines(b::at<const uint8_t>(address), bytes);
    });
    // Run the kernel's product instruction on registers; return the multiply-accumulates done.
    const auto isa_of = [](const char *fn, const std::string &kernel, int64_t rounds) {
        const Isa *isa = &checked_isa(fn, kernel);
        if (rounds < 1)
            throw pybind11::value_error(std::string(fn) + ": rounds must be at least 1, got " +
                                        std::to_string(rounds));
        return isa;
    };
    m.def("peak_i8", [isa_of](const std::string &kernel, int64_t rounds) {
        const Isa *isa = isa_of("peak_i8", kernel, rounds);
        pybind11::gil_scoped_release release; // several threads at once tell what all cores can do
        return isa->peak_i8(rounds);
    });
    m.def("peak_f32", [isa_of](const std::string &kernel, int64_t rounds) {
        return isa_of("peak_f32", kernel, rounds)->peak_f32(rounds);
    });
    m.def("last_used", [](const std::string &op) -> pybind11::object {
        const char *k = b::last_used_kernel[static_cast<size_t>(b::op_slot(op.c_str()))];
        return k ? pybind11::object(pybind11::str(k)) : pybind11::none();
    });
    b::bind_recall(m);
    b::bind_eager(m);
    b::bind_pack(m);
    b::bind_int8_linear(m);
    b::bind_sparse_linear(m);
    b::bind_lowrank_linear(m);
    b::bind_int8_conv2d(m);
    b::bind_sparse_conv2d(m);
    b::bind_lowrank_conv2d(m);
}
