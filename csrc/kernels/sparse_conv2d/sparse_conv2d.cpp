#include "kernels/sparse_conv2d/sparse_conv2d.h"

#include "kernels/common/conv.h"

namespace tautorch {

// Weights may come expanded, in a dense pack.
void sparse_conv2d(const ConvArgs &a) {
    if (a.geometry.batch == 0 || a.outputs == 0)
        return;
    const Epilogue e = with_correction(a.epilogue, a.packed, operand_of(a.packed), a.quant);
    const PackKind kind = header_of(a.packed).kind;
    if (kind != PackKind::sparse_i8 && kind != PackKind::sparse_f32)
        conv_product(a, e);
    else
        product(a.packed, source_of(a), image_output(e, a.out, a.out_channels_last, a.geometry, a.outputs));
}

} // namespace tautorch
