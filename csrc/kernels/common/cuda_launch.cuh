// How our own kernels are launched: one place, so that a test can run their code on the CPU by putting
// another launcher here.
#pragma once

#ifdef TAUTORCH_EMULATED_LAUNCH
#include TAUTORCH_EMULATED_LAUNCH
#else
#include <cuda_runtime.h>

namespace tautorch::cuda {

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void *stream,
                  const Arguments &...arguments) {
    kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
}

} // namespace tautorch::cuda
#endif
