// How our own kernels are launched: one place, so that a test can run their code on the CPU by putting
// another launcher here.
#pragma once

#ifdef TAUTORCH_EMULATED_LAUNCH
#include TAUTORCH_EMULATED_LAUNCH
#else
#include <atomic>
#include <cstdint>
#include <cuda_runtime.h>

namespace tautorch::cuda {

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void *stream,
                  const Arguments &...arguments) {
    kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
}

// The bytes that launch_shared() gave the block, on 16.
__device__ __forceinline__ uint8_t *dynamic_shared() {
    extern __shared__ __align__(16) uint8_t bytes[];
    return bytes;
}

// With `bytes` of shared memory per block. Past 48 KB a kernel must be allowed them, once per device.
template <auto kKernel, class... Arguments>
int launch_shared(unsigned blocks, unsigned threads, int bytes, void *stream, const Arguments &...arguments) {
    static std::atomic<uint64_t> allowed{0};
    int device = 0;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess)
        return static_cast<int>(e);
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device >= 64 || (allowed.load(std::memory_order_relaxed) & bit) == 0) {
        const cudaError_t e =
            cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (e != cudaSuccess)
            return static_cast<int>(e);
        allowed.fetch_or(bit, std::memory_order_relaxed);
    }
    kKernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
}

} // namespace tautorch::cuda
#endif
