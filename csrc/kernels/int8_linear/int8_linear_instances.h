// Every int8_linear kernel that is instantiated. Activation, bias, zero points and which type of a size comes
// out are run-time choices everywhere.
#pragma once

// CUTLASS's, each for outputs of 1, 2 and 4 bytes, so that a line costs three compilations. Tiles are of y: m
// rows by n outputs; clusters as CUTLASS counts them. Cooperative: two warpgroups share a tile. Pingpong:
// each has one, and multiplies while the other stores. X(name, swapped, tile m, n, k, cluster m, n, mainloop
// schedule, epilogue schedule, scheduler)
#define TAUTORCH_INT8_LINEAR_SM90A_TILE(X)                                                                   \
    X(sm90a_64x64x256, false, 64, 64, 256, 1, 1, KernelTmaWarpSpecialized, TmaWarpSpecialized,               \
      PersistentScheduler)                                                                                   \
    X(sm90a_128x128x128_pingpong, false, 128, 128, 128, 2, 1, KernelTmaWarpSpecializedPingpong,              \
      TmaWarpSpecialized, PersistentScheduler)
#define TAUTORCH_INT8_LINEAR_SM90A_COOPERATIVE(X)                                                            \
    X(sm90a_128x256x128_cooperative, false, 128, 256, 128, 2, 1, KernelTmaWarpSpecializedCooperative,        \
      TmaWarpSpecializedCooperative, PersistentScheduler)                                                    \
    X(sm90a_256x128x128_cooperative, false, 256, 128, 128, 1, 2, KernelTmaWarpSpecializedCooperative,        \
      TmaWarpSpecializedCooperative, PersistentScheduler)
#define TAUTORCH_INT8_LINEAR_SM90A_SPLIT(X)                                                                  \
    X(sm90a_128x128x128_split, false, 128, 128, 128, 1, 1, KernelTmaWarpSpecializedCooperative,              \
      TmaWarpSpecializedCooperative, StreamKScheduler)
#define TAUTORCH_INT8_LINEAR_SM90A_SWAPPED(X)                                                                \
    X(sm90a_64x128x128_swapped, true, 64, 128, 128, 1, 1, KernelTmaWarpSpecializedCooperative,               \
      TmaWarpSpecializedCooperative, StreamKScheduler)
#define TAUTORCH_INT8_LINEAR_SM90A(X)                                                                        \
    TAUTORCH_INT8_LINEAR_SM90A_TILE(X)                                                                       \
    TAUTORCH_INT8_LINEAR_SM90A_COOPERATIVE(X)                                                                \
    TAUTORCH_INT8_LINEAR_SM90A_SPLIT(X)                                                                      \
    TAUTORCH_INT8_LINEAR_SM90A_SWAPPED(X)

// X(name, tile m, n, k, warp m, n, k, stages)
#define TAUTORCH_INT8_LINEAR_SM80(X)                                                                         \
    X(sm80_64x64x128, 64, 64, 128, 32, 64, 64, 5)                                                            \
    X(sm80_128x128x64, 128, 128, 64, 64, 64, 64, 5)

// Ours, one compilation of seconds each (weight-only: bf16 and fp16), for 8.0 and for 9.0 and later.
// X(name, tiles of 8 rows, tiles of 16 outputs, warps, stages)
#define TAUTORCH_INT8_LINEAR_STREAM(X)                                                                       \
    X(stream_8, 1, 1, 8, 6)                                                                                  \
    X(stream_16, 2, 2, 8, 4)                                                                                 \
    X(stream_32, 4, 2, 8, 3)
#define TAUTORCH_INT8_LINEAR_WEIGHT_ONLY(X)                                                                  \
    X(weight_only_8, 1, 1, 8, 6)                                                                             \
    X(weight_only_16, 2, 2, 8, 3)                                                                            \
    X(weight_only_32, 4, 2, 4, 4)
