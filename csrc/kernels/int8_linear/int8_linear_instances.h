// Every int8_linear kernel that is instantiated, each for outputs of 1, 2 and 4 bytes (int8; bf16 or fp16;
// fp32 or int32: which of a size, and activation, bias and zero points, are run-time choices). A line costs
// three compilations of 20 to 40 seconds, so a line needs a measurement that asks for it.
#pragma once

// X(name, tile m, n, k, cluster m, n, mainloop schedule, epilogue schedule)
#define TAUTORCH_INT8_LINEAR_SM90A(X)                                                                        \
    X(sm90a_64x64x256, 64, 64, 256, 1, 1, KernelTmaWarpSpecialized, TmaWarpSpecialized)                      \
    X(sm90a_128x128x128_pingpong, 128, 128, 128, 2, 1, KernelTmaWarpSpecializedPingpong, TmaWarpSpecialized) \
    X(sm90a_128x256x128_cooperative, 128, 256, 128, 2, 1, KernelTmaWarpSpecializedCooperative,               \
      TmaWarpSpecializedCooperative)

// X(name, tile m, n, k, warp m, n, k, stages)
#define TAUTORCH_INT8_LINEAR_SM80(X)                                                                         \
    X(sm80_64x64x128, 64, 64, 128, 32, 64, 64, 5)                                                            \
    X(sm80_128x128x64, 128, 128, 64, 64, 64, 64, 5)
