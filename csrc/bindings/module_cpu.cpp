// tautorch._C: the CPU kernels. Takes addresses and sizes as integers; links neither torch nor OpenMP.
#include "bindings/call.h"
#include "core/arch.h"
#include "core/parallel.h"
#include "kernels/common/sell.h"

#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>

namespace tautorch::bindings {
namespace {

constexpr std::array<const char *, 6> kOps = {"int8_linear", "sparse_linear", "lowrank_linear",
                                              "int8_conv2d", "sparse_conv2d", "lowrank_conv2d"};
std::array<std::atomic<const char *>, kOps.size()> last_used_kernel;

int64_t integer(const py::dict &d, const char *key) { return d[key].cast<int64_t>(); }

[[noreturn]] void fail(const char *op, const char *name, const std::string &must, const std::string &got) {
    throw py::value_error(std::string(op) + ": " + name + " must " + must + ", got " + got);
}

// An enumerator from 0 to `last`.
template <class E> E code_of(const char *op, const py::dict &d, const char *key, E last) {
    const int64_t code = integer(d, key);
    if (code < 0 || code > static_cast<int64_t>(last))
        fail(op, key, "be a known code", std::to_string(code));
    return static_cast<E>(code);
}

// Zero, subnormal and infinite scales have no inverse to quantise with.
void check_scale(const char *op, const char *name, float scale) {
    if (scale > 0 && std::isfinite(scale) && std::isfinite(1.0f / scale))
        return;
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(scale));
    fail(op, name, "be positive and finite, with a finite inverse", text);
}

int32_t zero_point(const char *op, const py::dict &d, const char *key) {
    const int32_t *z = at<const int32_t>(integer(d, key));
    if (z && (*z < -128 || *z > 127))
        fail(op, key, "be in [-128, 127]", std::to_string(*z));
    return z ? *z : 0;
}

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

const PackHeader &checked_header(const char *op, const uint8_t *packed, int64_t bytes) {
    const auto fail = [op](const std::string &what) -> const PackHeader & {
        throw py::value_error(std::string(op) + ": packed weights " + what);
    };
    if (!packed || bytes < static_cast<int64_t>(sizeof(PackHeader)))
        return fail("are shorter than their header");
    if (reinterpret_cast<uintptr_t>(packed) % alignof(PackHeader) != 0)
        return fail("must start at a multiple of 8 bytes; clone them");
    const PackHeader &h = header_of(packed);
    if (h.magic != kPackMagic || h.version != kPackVersion)
        return fail("have no header of this version; pack the weights again");
    if (h.total > bytes)
        return fail("are cut short: header says " + std::to_string(h.total) + " bytes, got " +
                    std::to_string(bytes));
    const Isa *isa = find_isa(h.isa);
    if (!isa)
        return fail("were made for a kernel this build does not have; pack the weights again");
    if (!isa_supported(*isa))
        return fail(std::string("were made for ") + isa->name +
                    ", which this CPU lacks; pack the weights again");
    if (!header_consistent(*isa, h))
        return fail("have a header that contradicts itself; pack the weights again");
    return h;
}

const PackHeader &checked_pack(const char *op, const uint8_t *packed, int64_t bytes) {
    const PackHeader &h = checked_header(op, packed, bytes);
    if (h.kind == PackKind::sparse_i8 && h.slots > 0 && h.blocks == 0 && !sell_supported(*find_isa(h.isa)))
        throw py::value_error(std::string(op) +
                              ": packed weights need AVX512-VBMI, which this CPU lacks; pack "
                              "the weights again");
    if (!entries_consistent(packed))
        throw py::value_error(std::string(op) +
                              ": packed weights list inputs they do not have; pack the weights again");
    return h;
}

Epilogue epilogue_of(const char *op, const py::dict &d, int64_t outputs) {
    constexpr const char *kVectors[][2] = {{"weight_scale", "weight_scales"}, {"bias", "biases"}};
    for (const auto &[address, count] : kVectors)
        if (integer(d, address) != 0 && integer(d, count) != outputs)
            fail(op, address, "have " + std::to_string(outputs) + " values, one for each packed output",
                 std::to_string(integer(d, count)));
    Epilogue e;
    e.w_scale = at<const float>(integer(d, "weight_scale"));
    e.bias = at<const float>(integer(d, "bias"));
    e.activation = code_of<Activation>(op, d, "activation", Activation::silu);
    if (const float *s = at<const float>(integer(d, "out_scale"))) {
        check_scale(op, "out_scale", *s);
        e.out_inv_scale = 1.0f / *s;
    }
    e.out_zero_point = zero_point(op, d, "out_zero_point");
    return e;
}

ActQuant quant_of(const char *op, const py::dict &d) {
    ActQuant q;
    q.mode = code_of<ActQuant::Mode>(op, d, "mode", ActQuant::none);
    const float *scale = at<const float>(integer(d, "x_scale"));
    if (!scale && (q.mode == ActQuant::given || q.mode == ActQuant::fixed))
        fail(op, "x_scale", "be given", "none");
    if (q.mode == ActQuant::given) {
        q.given_scale = scale;
        q.given_scales = integer(d, "x_scales");
    } else if (q.mode == ActQuant::fixed) {
        check_scale(op, "x_scale", *scale);
        q.scale = *scale;
    }
    q.zero_point = zero_point(op, d, "x_zero_point");
    return q;
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
        const Isa *isa = find_isa(kernel.c_str());
        if (!isa || !isa_supported(*isa))
            throw pybind11::value_error(std::string(fn) + ": this CPU cannot run kernel '" + kernel + "'");
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
    b::bind_pack(m);
    b::bind_int8_linear(m);
    b::bind_sparse_linear(m);
    b::bind_lowrank_linear(m);
    b::bind_int8_conv2d(m);
    b::bind_sparse_conv2d(m);
    b::bind_lowrank_conv2d(m);
}
