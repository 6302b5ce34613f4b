#include "kernels/int8_conv2d/int8_conv2d.h"

namespace tautorch {

void int8_conv2d(const ConvArgs &a) {
    if (a.geometry.batch == 0 || a.outputs == 0)
        return;
    const Epilogue e = with_correction(a.epilogue, a.packed, operand_of(a.packed), a.quant);
    product(a.packed, source_of(a), image_output(e, a.out, a.out_channels_last, a.geometry, a.outputs));
}

} // namespace tautorch
