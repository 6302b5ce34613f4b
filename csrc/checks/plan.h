// What must hold of a call, and how its settings become a driver's arguments. As pack.h, for Python and C.
#pragma once

#include "checks/pack.h"
#include "kernels/lowrank_linear/lowrank_linear.h"

namespace tautorch {

// Epilogue and quantisation settings that every operator takes alike. Null: none. Scales and zero points
// behind single-value pointers are read when a plan is made; vectors at every call.
struct Tail {
    const float *weight_scale = nullptr;
    int64_t weight_scales = 0;
    const float *bias = nullptr;
    int64_t biases = 0;
    int64_t activation = 0; // Activation
    const float *out_scale = nullptr;
    const int32_t *out_zero_point = nullptr;
    int64_t mode = 0; // ActQuant::Mode
    const float *x_scale = nullptr;
    int64_t x_scales = 0;
    const int32_t *x_zero_point = nullptr;
};

void check_scale(const char *op, const char *name, float scale);
int32_t checked_zero_point(const char *op, const char *name, const int32_t *z); // null: 0

Epilogue checked_epilogue(const char *op, const Tail &tail, int64_t outputs);
// Of activations that fit a pack.
ActQuant checked_quant(const char *op, const Tail &tail, const PackHeader &h);

// The part of a linear operator's arguments that its pack and its tail say.
void fill_linear(const char *op, LinearArgs &args, const PackHeader &h, const uint8_t *packed,
                 int64_t outputs, const Tail &tail);

struct Packed {
    const uint8_t *data = nullptr;
    int64_t bytes = 0;
};
// Factors and a residual (data null for none) that fit each other and k inputs; the header of down.
const PackHeader &fill_lowrank(LowRankLinearArgs &args, Packed down, Packed up, Packed residual, int64_t k,
                               const float *down_scale, const float *residual_scale, const Tail &tail);

// Multiply-accumulates of one row of x, or of one output pixel.
int64_t macs_of(const PackHeader &h);
int64_t macs_of(const LowRankLinearArgs &args);

// Dtypes of a call, and how many scales int8 x must have if more than one, against what the plan was made
// for.
void check_call(const ActQuant &q, int64_t x_dtype, int64_t out_dtype, int64_t scales);

} // namespace tautorch
