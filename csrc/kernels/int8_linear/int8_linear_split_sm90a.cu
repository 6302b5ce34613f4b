// int8_linear on Hopper, tiles whose K several blocks share: stream-K: every multiprocessor gets the same
// share of the steps, whatever the number of tiles.
#include "kernels/int8_linear/int8_linear_sm90a.cuh"

namespace tautorch::cuda {

TAUTORCH_INT8_LINEAR_SM90A_SPLIT(TAUTORCH_DEFINE_SM90A)

} // namespace tautorch::cuda
