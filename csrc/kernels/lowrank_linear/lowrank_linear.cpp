#include "kernels/lowrank_linear/lowrank_linear.h"

namespace tautorch {

void lowrank_linear(const LowRankLinearArgs &a) {
    lowrank_product({a.packed, a.up, a.residual, a.down_scale, a.residual_scale, a.quant, a.out}, a.x,
                    a.x_stride, a.m);
}

} // namespace tautorch
