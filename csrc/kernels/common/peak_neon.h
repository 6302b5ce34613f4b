// What the arithmetic of a NEON core could reach: an instruction on registers alone, 24 results in flight.
#pragma once

#include <cstdint>

// `step` is assembly that adds to register v\r; v24, v30 and v31 are free to use.
#define TT_PEAK(step)                                                                                        \
    asm volatile(".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,30,31\n\t"         \
                 "movi v\\r\\().4s, #0\n\t.endr\n1:\n\t"                                                     \
                 ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n\t" step             \
                 "\n\t.endr\n\tsubs %0, %0, #1\n\tb.ne 1b"                                                   \
                 : "+r"(n)                                                                                   \
                 :                                                                                           \
                 : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12",    \
                   "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24",       \
                   "v30", "v31")

namespace tautorch {
namespace {

int64_t peak_f32(int64_t rounds) {
    int64_t n = rounds;
    TT_PEAK("fmla v\\r\\().4s, v30.4s, v31.s[0]");
    return rounds * 24 * 4;
}

} // namespace
} // namespace tautorch
