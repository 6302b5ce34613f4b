#include "kernels/lowrank_linear/lowrank_linear.h"

namespace tautorch {

void lowrank_linear(const LowRankLinearArgs &a) {
    if (a.m == 0)
        return;
    lowrank_product(a.packed, a.down_scale, a.up, a.quant, source_of(a), a.out);
}

} // namespace tautorch
