#include "kernels/lowrank_conv2d/lowrank_conv2d.h"

namespace tautorch {

void lowrank_conv2d(const LowRankConv2dArgs &a) {
    if (a.geometry.batch == 0 || a.outputs == 0)
        return;
    LowRank l;
    l.down = a.packed;
    l.down_scale = a.down_scale;
    l.up = a.up;
    l.quant = a.quant;
    l.out = image_output(a.epilogue, a.out, a.out_channels_last, a.geometry, a.outputs);
    lowrank_product(l, source_of(static_cast<const ConvArgs &>(a)));
}

} // namespace tautorch
