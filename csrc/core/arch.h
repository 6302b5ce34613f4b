// CPU features, read once. Kernel tables ask these; nothing else looks at cpuid, auxiliary vectors or sysctl.
#pragma once

namespace tautorch {

struct CpuFeatures {
    bool avx2 = false;        // AVX2 + FMA + F16C
    bool avx_vnni = false;    // the VEX-encoded vpdpbusd
    bool avx512_vnni = false; // AVX-512 F, BW, DQ, VL and VNNI
    bool avx512_vbmi = false; // the same and VBMI
    bool amx = false;         // the same, AMX-INT8, and the operating system lets this process use it
    // 512-bit instructions run as two halves: Zen 4. (Some mobile Zen 5 do too and are not told apart.)
    bool halves_512 = false;
    // Arm; NEON itself is part of every 64-bit Arm core.
    bool dotprod = false; // SDOT
    bool i8mm = false;    // SMMLA
};

const CpuFeatures &cpu_features();

} // namespace tautorch
