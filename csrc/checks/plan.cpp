#include "checks/plan.h"

#include "kernels/common/cells.h"

#include <cmath>
#include <cstdio>

namespace tautorch {
namespace {

// An enumerator from 0 to `last`.
template <class E> E code_of(const char *op, const char *name, int64_t code, E last) {
    if (code < 0 || code > static_cast<int64_t>(last))
        refuse(op, name, "be a known code", std::to_string(code));
    return static_cast<E>(code);
}

} // namespace

// Zero, subnormal and infinite scales have no inverse to quantise with.
void check_scale(const char *op, const char *name, float scale) {
    if (scale > 0 && std::isfinite(scale) && std::isfinite(1.0f / scale))
        return;
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(scale));
    refuse(op, name, "be positive and finite, with a finite inverse", text);
}

int32_t checked_zero_point(const char *op, const char *name, const int32_t *z) {
    if (z && (*z < -128 || *z > 127))
        refuse(op, name, "be in [-128, 127]", std::to_string(*z));
    return z ? *z : 0;
}

Epilogue checked_epilogue(const char *op, const Tail &tail, int64_t outputs) {
    const auto check_count = [&](const char *name, const float *vector, int64_t count) {
        if (vector && count != outputs)
            refuse(op, name, "have " + std::to_string(outputs) + " values, one for each packed output",
                   std::to_string(count));
    };
    check_count("weight_scale", tail.weight_scale, tail.weight_scales);
    check_count("bias", tail.bias, tail.biases);
    Epilogue e;
    e.w_scale = tail.weight_scale;
    e.bias = tail.bias;
    e.activation = code_of(op, "activation", tail.activation, Activation::silu);
    if (tail.out_scale) {
        check_scale(op, "out_scale", *tail.out_scale);
        e.out_inv_scale = 1.0f / *tail.out_scale;
    }
    e.out_zero_point = checked_zero_point(op, "out_zero_point", tail.out_zero_point);
    return e;
}

ActQuant checked_quant(const char *op, const Tail &tail, const PackHeader &h) {
    ActQuant q;
    q.mode = code_of(op, "mode", tail.mode, ActQuant::none);
    // The scales of no rows lie nowhere; check_call refuses any rows with them.
    const bool scaled = q.mode == ActQuant::fixed || (q.mode == ActQuant::given && tail.x_scales != 0);
    if (!tail.x_scale && scaled)
        refuse(op, "x_scale", "be given", "none");
    if (q.mode == ActQuant::given) {
        q.given_scale = tail.x_scale;
        q.given_scales = tail.x_scales;
    } else if (q.mode == ActQuant::fixed) {
        check_scale(op, "x_scale", *tail.x_scale);
        q.scale = *tail.x_scale;
    }
    q.zero_point = checked_zero_point(op, "x_zero_point", tail.x_zero_point);
    const bool floating = operand_of(*find_isa(h.isa), h.kind) == OperandKind::f32;
    if (floating != (q.mode == ActQuant::none))
        refuse(std::string(op) + ": packed weights are of another kind than the activations");
    return q;
}

void fill_linear(const char *op, LinearArgs &args, const PackHeader &h, const uint8_t *packed,
                 int64_t outputs, const Tail &tail) {
    args.packed = packed;
    args.quant = checked_quant(op, tail, h);
    args.out.epilogue = checked_epilogue(op, tail, outputs);
    args.out.row_stride = outputs;
}

const PackHeader &fill_lowrank(LowRankLinearArgs &args, Packed down, Packed up, Packed residual, int64_t k,
                               const float *down_scale, const float *residual_scale, const Tail &tail) {
    constexpr const char *op = "lowrank_linear";
    const PackHeader &d = checked_pack(op, down.data, down.bytes);
    const PackHeader &u = checked_pack(op, up.data, up.bytes);
    if (d.k != k || d.n != u.k || d.kind != u.kind || d.isa != u.isa ||
        d.taps * u.taps * d.groups * u.groups != 1 || d.kind > PackKind::dense_f32)
        refuse("lowrank_linear: packed factors do not fit each other or x");
    fill_linear(op, args, d, down.data, u.n, tail);
    args.up = up.data;
    args.down_scale = down_scale;
    if (residual.data) {
        const PackHeader &r = checked_pack(op, residual.data, residual.bytes);
        const bool integer = operand_of(*find_isa(r.isa), r.kind) != OperandKind::f32;
        if (r.k != k || r.n != u.n || r.isa != d.isa || r.taps * r.groups != 1 ||
            r.kind == PackKind::depthwise_i8 || r.kind == PackKind::dense_w8 ||
            (!integer && args.quant.mode != ActQuant::none))
            refuse("lowrank_linear: the packed residual does not fit the factors or x");
        args.residual = residual.data;
        args.residual_scale = residual_scale;
    }
    return d;
}

int64_t macs_of(const PackHeader &h) {
    if (h.cells > 0)
        return h.cells * cell_bytes(h);
    if (h.kind == PackKind::sparse_i8 || h.kind == PackKind::sparse_f32)
        return h.entries * h.gs * (h.kind == PackKind::sparse_i8 ? 4 : 1);
    return h.groups * h.n * h.k * h.taps;
}

int64_t macs_of(const LowRankLinearArgs &args) {
    return macs_of(header_of(args.packed)) + macs_of(header_of(args.up)) +
           (args.residual ? macs_of(header_of(args.residual)) : 0);
}

void check_call(const ActQuant &q, int64_t x_dtype, int64_t out_dtype, int64_t scales) {
    const bool given = q.mode == ActQuant::given;
    const auto i8 = static_cast<int64_t>(DType::i8), i32 = static_cast<int64_t>(DType::i32);
    if (x_dtype < 0 || x_dtype > i8 || (x_dtype == i8) != given)
        refuse("this plan is not for x of dtype code " + std::to_string(x_dtype));
    if (out_dtype < 0 || out_dtype > i32 || (out_dtype == i32 && q.mode == ActQuant::none))
        refuse("this plan is not for out of dtype code " + std::to_string(out_dtype));
    if (given && q.given_scales != 1 && q.given_scales != scales)
        refuse("this plan is for " + std::to_string(q.given_scales) + " scales of x, got " +
               std::to_string(scales));
}

} // namespace tautorch
