// The instructions of compute capability 8.0 that our own matrix kernels are made of, one function each,
// named after PTX. A test runs the kernels on the CPU by putting functions of the documented meaning here.
//
// Fragments: with g = lane / 4 and t = lane % 4, a register holds 4 bytes (8-bit) or a pair (16-bit) of
//   A  row g (registers 0, 2) and g + 8 (1, 3), elements of K from 4t or 2t (0, 1) and half a step on (2, 3)
//   B  column g, the same elements of K
//   D  rows g (0, 1) and g + 8 (2, 3), columns 2t and 2t + 1
// The order of K is free as long as A and B agree, which is what our kernels use: a thread's 16 adjacent
// bytes of a row serve several steps.
#pragma once

#ifdef TAUTORCH_EMULATED_LAUNCH
#include TAUTORCH_EMULATED_LAUNCH
#else
#include <cstdint>

namespace tautorch::cuda {

// Copies the first `bytes` of 16 from global to shared memory and clears the rest; 0 reads nothing. Both on
// 16 bytes. Through L1: for what several blocks of a multiprocessor read.
__device__ __forceinline__ void cp_async(void *to, const void *from, int bytes) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes)
                 : "memory");
}
// Past L1: for what is read once.
__device__ __forceinline__ void cp_async_once(void *to, const void *from, int bytes) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last N groups of this thread have arrived.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 16-byte matrices; lane l gives the row l % 8 of matrix l / 8, and gets 4 bytes of row l / 4 of
// each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Half of A is left out: of every 4 elements of K, the 2 that `e` names by 2 bits each, lower first. Step K
// = 64. e: of row g, K 0-31 (t 0), row g + 8, K 0-31 (t 1), row g, K 32-63 (t 2), row g + 8, K 32-63 (t 3).
__device__ __forceinline__ void mma_sp_m16n8k64(int32_t (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t e) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                   "r"(e));
}

// The same of 16-bit elements, step K = 32, of bf16 or fp16. e: of lanes t < 2 (kSelector 0) or t >= 2 (1);
// with t mod 2 the half of K, row g in the lower 16 bits and row g + 8 in the upper.
#define TAUTORCH_MMA_SP_16(type, selector)                                                                   \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                 \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, " selector ";"     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),   \
                   "r"(e))
template <bool kBf16, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                uint32_t e) {
    if constexpr (kBf16 && kSelector == 0)
        TAUTORCH_MMA_SP_16("bf16", "0x0");
    else if constexpr (kBf16)
        TAUTORCH_MMA_SP_16("bf16", "0x1");
    else if constexpr (kSelector == 0)
        TAUTORCH_MMA_SP_16("f16", "0x0");
    else
        TAUTORCH_MMA_SP_16("f16", "0x1");
}
#undef TAUTORCH_MMA_SP_16

// Bytes of the two words by number (low word 0-3, high word 4-7), lowest first.
__device__ __forceinline__ uint32_t byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    return __byte_perm(low, high, which);
}
// a - b, rounded once, in each half.
__device__ __forceinline__ uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a)); // -1
    return d;
}
__device__ __forceinline__ uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

} // namespace tautorch::cuda
#endif
