// int8_linear on Hopper, few rows: the weights are the A operand, so a tile has as many rows as there are;
// stream-K.
#include "kernels/int8_linear/int8_linear_sm90a.cuh"

namespace tautorch::cuda {

TAUTORCH_INT8_LINEAR_SM90A_SWAPPED(TAUTORCH_DEFINE_SM90A)

} // namespace tautorch::cuda
