// The instructions of mma_sm80.cuh by the meaning PTX gives them.
//
// Copies happen either at once or as late as the program allows, when the thread waits for their group: what
// reads too early is found by the one, what overwrites too early by the other.
#pragma once

#include "emulate.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace emulated {

struct Copy {
    void *to;
    const void *from;
    int bytes;
    void run() const {
        if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes < 0 ||
            bytes > 16)
            abort();
        std::memset(to, 0, 16);
        std::memcpy(to, from, static_cast<size_t>(bytes));
    }
};

inline bool late_copies = true;
inline thread_local std::vector<std::vector<Copy>> groups; // committed
inline thread_local std::vector<Copy> open_group;

} // namespace emulated

namespace tautorch::cuda {

inline void cp_async(void *to, const void *from, int bytes) {
    const emulated::Copy copy{to, from, bytes};
    if (emulated::late_copies)
        emulated::open_group.push_back(copy);
    else
        copy.run();
}
inline void cp_async_once(void *to, const void *from, int bytes) { cp_async(to, from, bytes); }
inline void cp_async_commit() {
    emulated::groups.push_back(emulated::open_group);
    emulated::open_group.clear();
}
template <int N> void cp_async_wait() {
    while (emulated::groups.size() > N) {
        for (const emulated::Copy &c : emulated::groups.front())
            c.run();
        emulated::groups.erase(emulated::groups.begin());
    }
}

// Gives the other lanes `mine`, then calls f with everybody's.
template <int N, class F> void together(const uint32_t (&mine)[N], F f) {
    emulated::Warp &warp = emulated::block->warps[threadIdx.x / 32];
    std::memcpy(warp.registers[threadIdx.x % 32], mine, sizeof mine);
    warp.together.arrive_and_wait();
    f(warp.registers, static_cast<int>(threadIdx.x % 32));
    warp.together.arrive_and_wait();
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    const auto address = reinterpret_cast<uint64_t>(row);
    if (address % 16)
        abort();
    const uint32_t mine[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
    together(mine, [&](auto &all, int lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            const uint32_t *a = all[8 * matrix + lane / 4];
            const auto from = reinterpret_cast<const uint8_t *>(uint64_t{a[1]} << 32 | a[0]);
            std::memcpy(&r[matrix], from + 4 * (lane % 4), 4);
        }
    });
}

inline int8_t byte_of(uint32_t w, int i) { return static_cast<int8_t>(w >> 8 * i); }

inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    together(mine, [&](auto &all, int lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 32; ++k) {
                const int t = k % 16 / 4, half = k / 16;
                d[i] += byte_of(all[4 * (row % 8) + t][2 * half + row / 8], k % 4) *
                        byte_of(all[4 * column + t][4 + half], k % 4);
            }
        }
    });
}

template <class F>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, F as_float) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    together(mine, [&](auto &all, int lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = d[i];
            for (int k = 0; k < 16; ++k) {
                const int t = k % 8 / 2, half = k / 8;
                const uint32_t x = all[4 * (row % 8) + t][2 * half + row / 8] >> 16 * (k % 2);
                const uint32_t y = all[4 * column + t][4 + half] >> 16 * (k % 2);
                sum += as_float(static_cast<uint16_t>(x)) * as_float(static_cast<uint16_t>(y));
            }
            d[i] = sum;
        }
    });
}
inline float bf16_to_float(uint16_t v) { return __uint_as_float(uint32_t{v} << 16); }
inline float f16_to_float(uint16_t v) { return __half2float(__ushort_as_half(v)); }
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16(d, a, b0, b1, bf16_to_float);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16(d, a, b0, b1, f16_to_float);
}

inline void mma_sp_m16n8k64(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
    const uint32_t mine[9] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], e};
    together(mine, [&](auto &all, int lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int c = 0; c < 32; ++c) { // of the 32 elements that are kept
                const uint32_t w = all[4 * (row % 8) + c % 16 / 4][2 * (c / 16) + row / 8];
                const uint32_t kept = all[4 * (row % 8) + c / 16 * 2 + row / 8][8] >> 2 * (c % 16);
                if (c % 2 == 1 &&
                    (kept & 3) <= (all[4 * (row % 8) + c / 16 * 2 + row / 8][8] >> 2 * (c % 16 - 1) & 3))
                    abort(); // the order that ordered_metadata asks for
                const int k = c / 2 * 4 + static_cast<int>(kept & 3);
                d[i] += byte_of(w, c % 4) * byte_of(all[4 * column + k % 16 / 4][4 + k / 16], k % 4);
            }
        }
    });
}

// As its comment in mma_sm80.cuh says, and the reordering of torch's semi-structured tensors (a test
// compares).
template <bool kBf16, int kSelector>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
    const uint32_t mine[9] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], e};
    const auto as_float = kBf16 ? bf16_to_float : f16_to_float;
    together(mine, [&](auto &all, int lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = d[i];
            for (int c = 0; c < 16; ++c) { // of the 16 elements that are kept
                const uint32_t places =
                    all[4 * (row % 8) + 2 * kSelector + c / 8][8] >> 16 * (row / 8) & 0xffff;
                const uint32_t place = places >> 2 * (c % 8) & 3;
                if (c % 2 == 1 && place <= (places >> 2 * (c % 8 - 1) & 3))
                    abort(); // the order that ordered_metadata asks for
                const int k = c / 2 * 4 + static_cast<int>(place);
                const uint32_t w = all[4 * (row % 8) + c % 8 / 2][2 * (c / 8) + row / 8] >> 16 * (c % 2);
                const uint32_t x = all[4 * column + k % 8 / 2][4 + k / 8] >> 16 * (k % 2);
                sum += as_float(static_cast<uint16_t>(w)) * as_float(static_cast<uint16_t>(x));
            }
            d[i] = sum;
        }
    });
}

inline uint32_t byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    if (which & 0x8888)
        abort(); // prmt would repeat a byte's sign
    const uint64_t both = uint64_t{high} << 32 | low;
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i)
        d |= static_cast<uint32_t>(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return d;
}
template <class F, class G> uint32_t halves(uint32_t a, uint32_t b, F as_float, G rounded) {
    uint32_t d = 0;
    for (int i = 0; i < 32; i += 16)
        d |= uint32_t{rounded(as_float(static_cast<uint16_t>(a >> i)) -
                              as_float(static_cast<uint16_t>(b >> i)))}
             << i;
    return d;
}
inline uint32_t sub_bf16x2(uint32_t a, uint32_t b) {
    return halves(a, b, bf16_to_float, [](float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); });
}
inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    return halves(a, b, f16_to_float, [](float v) { return __half_as_ushort(__float2half_rn(v)); });
}

} // namespace tautorch::cuda
