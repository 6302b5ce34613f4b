#include "core/arch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <cstdint>
#endif

namespace tautorch {
namespace {

CpuFeatures detect() {
    CpuFeatures f;
#if defined(__x86_64__)
    __builtin_cpu_init();
    // __builtin_cpu_supports also checks that the operating system saves the wide registers.
    f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    uint32_t a = 0, b = 0, c = 0, d = 0, family = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) {
        f.avx2 = f.avx2 && (c & (1u << 29)) != 0; // F16C
        family = (a >> 8 & 15) + (a >> 20 & 255);
    }
    f.avx512_vnni = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
    f.avx512_vbmi = f.avx512_vnni && __builtin_cpu_supports("avx512vbmi");
    f.halves_512 = f.avx512_vnni && __builtin_cpu_is("amd") && family == 0x19;
    if (f.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        f.avx_vnni = (a & (1u << 4)) != 0;
    }
#endif
    return f;
}

} // namespace

const CpuFeatures &cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

} // namespace tautorch
