#include "kernels/int8_conv2d/int8_conv2d.h"

#include "kernels/common/conv.h"

namespace tautorch {

void int8_conv2d(const ConvArgs &a) {
    if (a.geometry.batch == 0 || a.outputs == 0)
        return;
    conv_product(a, with_correction(a.epilogue, a.packed, operand_of(a.packed), a.quant));
}

} // namespace tautorch
