// int8_linear on Hopper, whole tiles of y: persistent blocks take turns over them.
#include "kernels/int8_linear/int8_linear_sm90a.cuh"

namespace tautorch::cuda {

TAUTORCH_INT8_LINEAR_SM90A_TILE(TAUTORCH_DEFINE_SM90A)

} // namespace tautorch::cuda
