#include "kernels/sparse_linear/sparse_linear.h"

namespace tautorch {

void sparse_linear(const LinearArgs &a) {
    if (a.m == 0)
        return;
    Output out = a.out;
    out.epilogue = with_correction(a.out.epilogue, a.packed, operand_of(a.packed), a.quant);
    product(a, out);
}

} // namespace tautorch
