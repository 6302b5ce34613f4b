// What a CUDA launcher returns, and the element types it is told about. No CUDA header is needed to read this.
#pragma once

#include <cstdint>

namespace tautorch::cuda {

// 0: launched. Positive: the cudaError_t of the call that failed. Negative: one of these.
enum Status : int {
  kOk = 0,
  kBadArgument = -1,     // a size, stride, alignment or type outside the launcher's contract
  kNoKernel = -2,        // no kernel of that name, or not one for this device
  kNoTensorMap = -3,     // the driver has no cuTensorMapEncodeTiled (it is older than CUDA 12)
  kCutlassRefused = -4,  // CUTLASS did not accept the problem
};

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt32 = 4 };

constexpr int64_t dtype_bytes(DType t) {
  return t == DType::kFloat32 || t == DType::kInt32 ? 4 : (t == DType::kInt8 ? 1 : 2);
}

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

constexpr int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

}  // namespace tautorch::cuda
