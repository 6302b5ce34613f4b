// The C interface: include/tautorch.h over the operators' drivers, with the checks that Python's bindings
// make.
#include "tautorch.h"

#include "capi/pool.h"
#include "checks/plan.h"
#include "kernels/int8_linear/int8_linear.h"
#include "kernels/sparse_linear/sparse_linear.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <system_error>

namespace {

using namespace tautorch;

static_assert(static_cast<int>(DType::i32) == TT_INT32 && static_cast<int>(Activation::silu) == TT_SILU);

thread_local char last_error[512] = "";

tt_status failed(tt_status status, const char *what) {
    std::snprintf(last_error, sizeof last_error, "%s", what);
    return status;
}

// No exception leaves through C.
template <class F> tt_status guarded(const F &f) {
    try {
        f();
        return TT_OK;
    } catch (const std::invalid_argument &e) {
        return failed(TT_INVALID, e.what());
    } catch (const std::bad_alloc &) {
        return failed(TT_OUT_OF_MEMORY, "out of memory");
    } catch (const std::system_error &e) {
        return failed(TT_OUT_OF_MEMORY, e.what());
    } catch (const std::exception &e) {
        return failed(TT_FAILED, e.what());
    }
}

void require(const char *op, const char *name, const void *pointer, size_t alignment = 1) {
    if (!pointer)
        refuse(op, name, "be given", "NULL");
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
        refuse(op, name, "start at a multiple of " + std::to_string(alignment) + " bytes", "another address");
}

void require_finite(const char *op, const char *name, const float *v, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (!std::isfinite(v[i]))
            refuse(op, name, "be finite", std::to_string(v[i]) + " at " + std::to_string(i));
}

const Isa &isa_of(const char *op, const char *kernel) {
    if (kernel)
        return checked_isa(op, kernel);
    int n = 0;
    const IsaEntry *table = isa_table(&n);
    while (!table[n - 1].supported) // the first, scalar, always is
        --n;
    return *table[n - 1].isa;
}

void check_buffer(const char *op, const void *packed, size_t bytes, const PackHeader &h) {
    require(op, "packed", packed, alignof(PackHeader));
    if (bytes < static_cast<size_t>(h.total))
        refuse(op, "bytes", "be at least " + std::to_string(h.total), std::to_string(bytes));
}

PackHeader dense_header_of(const char *kernel, int32_t kind, int64_t outputs, int64_t inputs) {
    constexpr PackKind kinds[] = {PackKind::dense_i8, PackKind::dense_f32, PackKind::dense_w8};
    if (kind < 0 || kind > TT_WEIGHTS_INT8_FLOAT_X)
        refuse("tt_dense_pack", "kind", "be one of tt_weights", std::to_string(kind));
    return checked_dense(isa_of("tt_dense_pack", kernel), static_cast<int64_t>(kinds[kind]), 1, outputs,
                         inputs, 1);
}

SparseEntries entries_of(const tt_sparse *w) {
    constexpr const char *op = "tt_sparse_pack";
    require(op, "weight", w, alignof(tt_sparse));
    if (w->group != 1 && w->group != 4)
        refuse(op, "group", "be 1 or 4", std::to_string(w->group));
    if (!sizes_fit(1, w->outputs, w->inputs, 1) || w->entries < 0)
        refuse("tt_sparse_pack: outputs, inputs or entries are out of range");
    require(op, "start", w->start, alignof(uint32_t));
    if (w->entries > 0)
        require(op, "index", w->index, alignof(uint16_t));
    const int64_t groups = div_up(w->outputs, w->group);
    if (w->start[groups] != w->entries)
        refuse(op, "the last start", "be the number of entries, " + std::to_string(w->entries),
               std::to_string(w->start[groups]));
    return {groups, w->start, w->index, w->values};
}

PackHeader sparse_header_of(const char *kernel, int32_t kind, const tt_sparse *w, const SparseEntries &e) {
    if (kind != TT_WEIGHTS_INT8 && kind != TT_WEIGHTS_FLOAT)
        refuse("tt_sparse_pack", "kind", "be TT_WEIGHTS_INT8 or TT_WEIGHTS_FLOAT", std::to_string(kind));
    const PackKind pack = kind == TT_WEIGHTS_INT8 ? PackKind::sparse_i8 : PackKind::sparse_f32;
    return checked_sparse(isa_of("tt_sparse_pack", kernel), static_cast<int64_t>(pack), w->group, 1,
                          w->outputs, w->inputs, 1, e, static_cast<int64_t>(SparseForm::automatic));
}

// ---- plans ----

constexpr uint64_t kPlanMagic = 0x32304e414c505454; // "TTPLAN02"

struct Plan {
    uint64_t magic;
    uint64_t sum; // of all words behind it
    void (*run)(const LowRankLinearArgs &);
    const char *kernel;
    LowRankLinearArgs args; // of all drivers: the others' is its base
    float x_scale;          // where args.quant points to when it runs: plans may be copied
};
static_assert(sizeof(Plan) <= sizeof(tt_plan));
static_assert(std::is_trivially_copyable_v<Plan>);
static_assert(sizeof(Plan) % sizeof(uint64_t) == 0);

// Odd factors: a word that changed always shows. Costs a call of tt_run 10 ns.
constexpr size_t kSumWord = 1;
uint64_t sum_of(const tt_plan &plan) {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
    uint64_t sum = 0;
    for (size_t i = kSumWord + 1; i < sizeof(Plan) / sizeof(uint64_t); ++i)
        sum += plan.opaque[i] * (kOdd + 2 * i);
    return sum;
}

// Whether a plan is as it was made.
bool read_plan(const tt_plan *from, Plan &p) {
    tt_plan copy; // `from` may lie anywhere
    std::memcpy(&copy, from, sizeof p);
    std::memcpy(static_cast<void *>(&p), &copy, sizeof p);
    return p.magic == kPlanMagic && p.sum == sum_of(copy);
}

void run_dense(const LowRankLinearArgs &a) { int8_linear(a); }
void run_sparse(const LowRankLinearArgs &a) { sparse_linear(a); }

int64_t stride_of(const char *op, const char *name, int64_t stride, int64_t least) {
    if (stride != 0 && stride < least)
        refuse(op, name, "be 0 or at least " + std::to_string(least), std::to_string(stride));
    return stride == 0 ? least : stride;
}

// Everything of a layer but what its packs, of so many outputs, say.
Tail tail_of(const char *op, const tt_layer &l, bool floating, int64_t outputs) {
    if (outputs != l.outputs)
        refuse(op, "outputs", "be " + std::to_string(outputs) + " as packed", std::to_string(l.outputs));
    if (l.x_dtype < 0 || l.x_dtype > TT_INT8)
        refuse(op, "x_dtype", "be TT_FLOAT32, TT_BFLOAT16, TT_FLOAT16 or TT_INT8", std::to_string(l.x_dtype));
    if (l.y_dtype < 0 || l.y_dtype > TT_INT32)
        refuse(op, "y_dtype", "be one of tt_dtype", std::to_string(l.y_dtype));
    const bool int8_x = l.x_dtype == TT_INT8, fixed = l.x_scale != 0;
    if (floating && (int8_x || fixed || l.y_dtype == TT_INT32))
        refuse(std::string(op) + ": float products take float x without x_scale and give no accumulators");
    if (!fixed && !floating && int8_x)
        refuse(op, "x_scale", "be given for TT_INT8 x", "0");
    if (!fixed && l.x_zero_point != 0)
        refuse(op, "x_zero_point", "be 0 without x_scale", std::to_string(l.x_zero_point));
    if ((l.y_dtype == TT_INT8) != (l.y_scale != 0))
        refuse(op, "y_scale", l.y_dtype == TT_INT8 ? "be given for TT_INT8 y" : "be 0 but for TT_INT8 y",
               std::to_string(l.y_scale));
    if (l.y_dtype == TT_INT8) { // by this header's names
        check_scale(op, "y_scale", l.y_scale);
        checked_zero_point(op, "y_zero_point", &l.y_zero_point);
    }
    if (l.weight_scale)
        require(op, "weight_scale", l.weight_scale, alignof(float));
    if (l.bias)
        require(op, "bias", l.bias, alignof(float));
    Tail t;
    t.weight_scale = l.weight_scale;
    t.bias = l.bias;
    t.weight_scales = t.biases = l.outputs;
    t.activation = l.activation;
    t.mode = floating ? ActQuant::none
             : int8_x ? ActQuant::given
             : fixed  ? ActQuant::fixed
                      : ActQuant::dynamic;
    t.x_scale = fixed ? &l.x_scale : nullptr;
    t.x_scales = 1;
    t.x_zero_point = &l.x_zero_point;
    t.out_scale = l.y_dtype == TT_INT8 ? &l.y_scale : nullptr;
    t.out_zero_point = &l.y_zero_point;
    return t;
}

bool is_float(const PackHeader &h) { return operand_of(*find_isa(h.isa), h.kind) == OperandKind::f32; }

// The rest of a plan whose args are filled in.
void finish(const char *op, const tt_layer &l, Plan &p, void (*run)(const LowRankLinearArgs &),
            int64_t outputs, tt_plan *out) {
    if (l.weight_scale)
        require_finite(op, "weight_scale", l.weight_scale, outputs);
    if (l.bias)
        require_finite(op, "bias", l.bias, outputs);
    if (p.args.quant.mode == ActQuant::given && !(l.x_scale > 0 && std::isfinite(l.x_scale)))
        refuse(op, "x_scale", "be positive and finite", std::to_string(l.x_scale));
    p.args.x_stride = stride_of(op, "x_stride", l.x_stride, l.inputs);
    p.args.out.row_stride = stride_of(op, "y_stride", l.y_stride, outputs);
    p.args.quant.dtype = static_cast<DType>(l.x_dtype);
    p.args.out.epilogue.out_dtype = static_cast<DType>(l.y_dtype);
    check_call(p.args.quant, l.x_dtype, l.y_dtype, 1);
    p.args.quant.given_scale = nullptr;
    p.x_scale = l.x_scale;
    p.magic = kPlanMagic;
    p.run = run;
    p.kernel = find_isa(header_of(p.args.packed).isa)->name;
    tt_plan made = {};
    std::memcpy(&made, &p, sizeof p);
    made.opaque[kSumWord] = sum_of(made);
    std::memcpy(out, &made, sizeof made);
}

int64_t signed_bytes(size_t n) { return n > INT64_MAX ? INT64_MAX : static_cast<int64_t>(n); }

Plan plan_of(const char *op, const tt_plan *plan) {
    require(op, "plan", plan);
    Plan p;
    if (!read_plan(plan, p))
        refuse(op, "plan", "be as tt_linear_plan or tt_lowrank_plan made it", "something else");
    return p;
}

} // namespace

int32_t tt_abi_version(void) { return TT_ABI_VERSION; }
const char *tt_version(void) { return TAUTORCH_VERSION; }
const char *tt_last_error(void) { return last_error; }

const char *tt_kernel_name(int32_t i) {
    int n = 0;
    const IsaEntry *table = isa_table(&n);
    return i >= 0 && i < n ? table[n - 1 - i].isa->name : nullptr;
}

int32_t tt_kernel_runs(const char *name) {
    const Isa *isa = name ? find_isa(name) : nullptr;
    return isa && isa_supported(*isa);
}

tt_status tt_set_threads(int32_t n) {
    return guarded([&] {
        if (n < 1 || n > 1024)
            refuse("tt_set_threads", "n", "be in [1, 1024]", std::to_string(n));
        start_pool(n);
    });
}

tt_status tt_set_thread_pool(tt_parallel_for_fn parallel_for, tt_num_threads_fn num_threads) {
    return guarded([&] {
        if (!parallel_for != !num_threads)
            refuse("tt_set_thread_pool: both functions must be given, or neither");
        start_pool(1);
        set_thread_pool(parallel_for, num_threads);
    });
}

tt_status tt_dense_pack_size(const char *kernel, int32_t kind, int64_t outputs, int64_t inputs,
                             size_t *bytes) {
    return guarded([&] {
        require("tt_dense_pack_size", "bytes", bytes, alignof(size_t));
        *bytes = static_cast<size_t>(round_up(dense_header_of(kernel, kind, outputs, inputs).total, 64));
    });
}

tt_status tt_dense_pack(const char *kernel, int32_t kind, int64_t outputs, int64_t inputs, const void *weight,
                        void *packed, size_t bytes) {
    return guarded([&] {
        constexpr const char *op = "tt_dense_pack";
        const PackHeader h = dense_header_of(kernel, kind, outputs, inputs);
        check_buffer(op, packed, bytes, h);
        if (outputs * inputs > 0)
            require(op, "weight", weight, kind == TT_WEIGHTS_FLOAT ? alignof(float) : 1);
        if (kind == TT_WEIGHTS_FLOAT)
            require_finite(op, "weight", static_cast<const float *>(weight), outputs * inputs);
        check_dense_values(h, weight, {inputs, 1, 0});
        dense_pack(h, weight, {inputs, 1, 0}, static_cast<uint8_t *>(packed));
    });
}

tt_status tt_sparse_pack_size(const char *kernel, int32_t kind, const tt_sparse *weight, size_t *bytes) {
    return guarded([&] {
        require("tt_sparse_pack_size", "bytes", bytes, alignof(size_t));
        const SparseEntries e = entries_of(weight);
        *bytes = static_cast<size_t>(round_up(sparse_header_of(kernel, kind, weight, e).total, 64));
    });
}

tt_status tt_sparse_pack(const char *kernel, int32_t kind, const tt_sparse *weight, void *packed,
                         size_t bytes) {
    return guarded([&] {
        constexpr const char *op = "tt_sparse_pack";
        const SparseEntries e = entries_of(weight);
        const PackHeader h = sparse_header_of(kernel, kind, weight, e);
        check_buffer(op, packed, bytes, h);
        if (weight->entries > 0)
            require(op, "values", weight->values, kind == TT_WEIGHTS_FLOAT ? alignof(float) : 1);
        if (kind == TT_WEIGHTS_FLOAT)
            require_finite(op, "values", static_cast<const float *>(weight->values),
                           weight->entries * weight->group);
        sparse_pack(h, e, static_cast<uint8_t *>(packed));
    });
}

tt_status tt_linear_plan(const tt_layer *layer, tt_plan *plan) {
    return guarded([&] {
        constexpr const char *op = "tt_linear_plan";
        require(op, "layer", layer, alignof(tt_layer));
        require(op, "plan", plan);
        const tt_layer &l = *layer;
        require(op, "packed", l.packed);
        const uint8_t *packed = static_cast<const uint8_t *>(l.packed);
        const PackHeader &h = checked_linear(op, packed, signed_bytes(l.packed_bytes), l.inputs, true);
        Plan p = {};
        fill_linear(op, p.args, h, packed, h.n, tail_of(op, l, is_float(h), h.n));
        finish(op, l, p, h.kind <= PackKind::dense_w8 ? run_dense : run_sparse, h.n, plan);
    });
}

tt_status tt_lowrank_plan(const tt_layer *layer, const void *up, size_t up_bytes, const float *down_scale,
                          tt_plan *plan) {
    return guarded([&] {
        constexpr const char *op = "tt_lowrank_plan";
        require(op, "layer", layer, alignof(tt_layer));
        require(op, "plan", plan);
        const tt_layer &l = *layer;
        const Packed down = {static_cast<const uint8_t *>(l.packed), signed_bytes(l.packed_bytes)};
        const Packed up_pack = {static_cast<const uint8_t *>(up), signed_bytes(up_bytes)};
        require(op, "packed", l.packed);
        require(op, "up", up);
        const PackHeader &d = checked_header(op, down.data, down.bytes);
        const int64_t outputs = checked_header(op, up_pack.data, up_pack.bytes).n;
        if (down_scale) {
            require(op, "down_scale", down_scale, alignof(float));
            require_finite(op, "down_scale", down_scale, d.n);
        }
        Plan p = {};
        fill_lowrank(p.args, down, up_pack, {}, l.inputs, down_scale, nullptr,
                     tail_of(op, l, is_float(d), outputs));
        finish(op, l, p, lowrank_linear, outputs, plan);
    });
}

const char *tt_plan_kernel(const tt_plan *plan) {
    Plan p;
    return plan && read_plan(plan, p) ? p.kernel : nullptr;
}

tt_status tt_run(const tt_plan *plan, const void *x, int64_t rows, void *y) {
    return guarded([&] {
        constexpr const char *op = "tt_run";
        Plan p = plan_of(op, plan);
        if (rows < 0)
            refuse(op, "rows", "not be negative", std::to_string(rows));
        const int64_t inputs = header_of(p.args.packed).k;
        if (rows > 0 && inputs > 0)
            require(op, "x", x, static_cast<size_t>(size_of(p.args.quant.dtype)));
        if (rows > 0 && p.args.out.row_stride > 0)
            require(op, "y", y, static_cast<size_t>(size_of(p.args.out.epilogue.out_dtype)));
        if (p.args.quant.mode == ActQuant::given)
            p.args.quant.given_scale = &p.x_scale;
        p.args.x = x;
        p.args.m = rows;
        p.args.out.data = y;
        as_request([&] { p.run(p.args); });
    });
}
