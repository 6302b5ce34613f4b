#include "kernels/lowrank_conv2d/lowrank_conv2d.h"

namespace tautorch {

void lowrank_conv2d(const LowRankConv2dArgs &a) {
    if (a.geometry.batch == 0 || a.outputs == 0)
        return;
    lowrank_product(a.packed, a.down_scale, a.up, a.quant, source_of(static_cast<const ConvArgs &>(a)),
                    image_output(a.epilogue, a.out, a.out_channels_last, a.geometry, a.outputs));
}

} // namespace tautorch
