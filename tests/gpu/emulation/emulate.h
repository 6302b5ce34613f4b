// Runs a CUDA kernel's source on the CPU: a block is as many threads as the kernel asks for, blocks follow
// one another. Every intrinsic has its documented meaning. Compile with -ffp-contract=off.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#undef __shared__
#define __shared__ static // one block at a time
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

using std::max;
using std::min;

namespace emulated {

struct Index {
    unsigned x;
};

struct Warp {
    std::barrier<> together{32};
    int64_t values[32];
    uint32_t registers[32][9]; // of an instruction that a warp executes together
};

struct Block {
    explicit Block(unsigned threads) : together(threads), warps(threads < 32 ? 1 : threads / 32) {}
    std::barrier<> together;
    std::vector<Warp> warps;
    uint8_t *shared = nullptr;
};

inline thread_local Block *block;

} // namespace emulated

inline thread_local emulated::Index threadIdx, blockIdx;

inline void __syncthreads() { emulated::block->together.arrive_and_wait(); }

template <class T, class F> T emulated_reduce(T v, F combine) {
    emulated::Warp &warp = emulated::block->warps[threadIdx.x / 32];
    warp.values[threadIdx.x % 32] = v;
    warp.together.arrive_and_wait();
    T all = static_cast<T>(warp.values[0]);
    for (int i = 1; i < 32; ++i)
        all = combine(all, static_cast<T>(warp.values[i]));
    warp.together.arrive_and_wait();
    return all;
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t v) {
    return emulated_reduce(v, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}
inline int32_t __reduce_add_sync(unsigned, int32_t v) {
    return emulated_reduce(v, [](int32_t a, int32_t b) { return a + b; });
}

inline void atomicMax(uint32_t *to, uint32_t v) {
    std::atomic_ref<uint32_t> all(*to);
    for (uint32_t seen = all; v > seen && !all.compare_exchange_weak(seen, v);) {
    }
}

inline float __shfl_xor_sync(unsigned, float v, int step) {
    emulated::Warp &warp = emulated::block->warps[threadIdx.x / 32];
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    warp.values[threadIdx.x % 32] = bits;
    warp.together.arrive_and_wait();
    bits = static_cast<int32_t>(warp.values[threadIdx.x % 32 ^ static_cast<unsigned>(step)]);
    warp.together.arrive_and_wait();
    std::memcpy(&v, &bits, 4);
    return v;
}

inline uint32_t __shfl_up_sync(unsigned, uint32_t v, int step) {
    emulated::Warp &warp = emulated::block->warps[threadIdx.x / 32];
    const int lane = static_cast<int>(threadIdx.x % 32);
    warp.values[lane] = v;
    warp.together.arrive_and_wait();
    const auto got = static_cast<uint32_t>(warp.values[lane >= step ? lane - step : lane]);
    warp.together.arrive_and_wait();
    return got;
}
inline void __syncwarp() { emulated::block->warps[threadIdx.x / 32].together.arrive_and_wait(); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
// The 32 bits from `shift` on of high:low; modulo 32, and at most 32.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> std::min(shift, 32u));
}

inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline int __float2int_rn(float v) { return v != v ? 0 : static_cast<int>(std::nearbyintf(v)); }
inline uint32_t __float_as_uint(float v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    return u;
}
inline int __float_as_int(float v) { return static_cast<int>(__float_as_uint(v)); }
inline float __uint_as_float(uint32_t u) {
    float v;
    std::memcpy(&v, &u, 4);
    return v;
}

namespace tautorch::cuda {

inline uint8_t *dynamic_shared() { return emulated::block->shared; }

template <class Kernel, class... Arguments>
int emulate_launch(Kernel kernel, unsigned blocks, unsigned threads, int bytes,
                   const Arguments &...arguments) {
    std::vector<uint8_t> shared(static_cast<size_t>(bytes) + 16);
    for (unsigned b = 0; b < blocks; ++b) {
        // A thread that leaves early drops out of the block's barrier, as on the device.
        emulated::Block block(threads);
        std::fill(shared.begin(), shared.end(), uint8_t{0xa5}); // nobody may count on what was there
        block.shared = shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16;
        std::vector<std::thread> pool;
        for (unsigned t = 0; t < threads; ++t) {
            pool.emplace_back([&, t] {
                emulated::block = &block;
                threadIdx.x = t;
                blockIdx.x = b;
                kernel(arguments...);
                block.together.arrive_and_drop();
            });
        }
        for (std::thread &t : pool)
            t.join();
    }
    return 0;
}

template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void *,
                  const Arguments &...arguments) {
    return emulate_launch(kernel, blocks, threads, 0, arguments...);
}

template <auto kKernel, class... Arguments>
int launch_shared(unsigned blocks, unsigned threads, int bytes, void *, const Arguments &...arguments) {
    return emulate_launch(kKernel, blocks, threads, bytes, arguments...);
}

} // namespace tautorch::cuda

#include "emulate_mma.h"
