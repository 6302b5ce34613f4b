// int8_linear on Hopper, whole tiles of y, two warpgroups a tile; a file of its own to compile beside the
// others.
#include "kernels/int8_linear/int8_linear_sm90a.cuh"

namespace tautorch::cuda {

TAUTORCH_INT8_LINEAR_SM90A_COOPERATIVE(TAUTORCH_DEFINE_SM90A)

} // namespace tautorch::cuda
