// What every CUDA launcher returns, and what their hosts share. No CUDA header is needed to read this.
#pragma once

#include "kernels/common/dtype.h"

namespace tautorch::cuda {

// 0: launched. Positive: the cudaError_t of the call that failed. Negative: one of these.
enum Status : int {
    kOk = 0,
    kBadArgument = -1,    // a size, stride, alignment or type outside the launcher's contract
    kNoKernel = -2,       // no kernel of that name, or not one for this device
    kNoTensorMap = -3,    // the driver has no cuTensorMapEncodeTiled (it is older than CUDA 12)
    kCutlassRefused = -4, // CUTLASS did not accept the problem
};

inline bool is_aligned(const void *p, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

} // namespace tautorch::cuda
