#include "kernels/sparse_conv2d/sparse_conv2d.h"

#include "kernels/common/conv.h"
#include "kernels/common/product_planes.h"
#include "kernels/common/strips.h"

namespace tautorch {

// Weights may come expanded, in a dense pack.
void sparse_conv2d(const ConvArgs &a) {
    if (a.geometry.batch == 0 || a.outputs == 0)
        return;
    const Epilogue e = with_correction(a.epilogue, a.packed, operand_of(a.packed), a.quant);
    const PackHeader &h = header_of(a.packed);
    if (h.kind != PackKind::sparse_i8 && h.kind != PackKind::sparse_f32)
        return conv_product(a, e);
    // An image without pixels has outputs all the same, where it is padded.
    const bool in_place = h.kind == PackKind::sparse_i8 && h.k > 0 && a.quant.mode == ActQuant::given &&
                          a.channels_last && a.geometry.height * a.geometry.width > 0;
    const Output out = image_output(e, a.out, a.out_channels_last, a.geometry, a.outputs);
    if (by_planes({a, *find_isa(h.isa), operand_of(a.packed), false}, h, out))
        return conv_product(a, e);
    if (in_place)
        return product(a.packed, image_in_place(a.quant, operand_of(a.packed), a.x, a.geometry, h.groups),
                       out);
    if (h.kind == PackKind::sparse_i8 && !runs_by_strips(h)) {
        const ImagePixels pixels = pixels_of(a);
        product(a.packed, pixels.later(), out);
        if (pixels.finite())
            return;
        // Samples with NaN or Inf were only found out on the way.
    }
    product(a.packed, source_of(a), out);
}

} // namespace tautorch
