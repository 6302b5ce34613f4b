#include "core/arch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace tautorch {
namespace {

#if defined(__aarch64__) && defined(__APPLE__)
bool has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

#if defined(__x86_64__)
// Tiles are 8 KB more for every switch of threads, so Linux wants to be asked for them.
bool has_amx() {
#if defined(__linux__)
    constexpr uint32_t kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    uint32_t a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) != 0 && (d & kInt8) != 0 &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

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
    f.amx = f.avx512_vnni && has_amx();
    if (f.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        f.avx_vnni = (a & (1u << 4)) != 0;
    }
#elif defined(__aarch64__) && defined(__APPLE__)
    f.dotprod = has("hw.optional.arm.FEAT_DotProd");
    f.i8mm = has("hw.optional.arm.FEAT_I8MM");
#elif defined(__aarch64__) && defined(__linux__)
    // Numbers of the kernel's interface, which older headers do not name.
    constexpr unsigned long kHwcapDotprod = 1ul << 20, kHwcap2I8mm = 1ul << 13;
    f.dotprod = (getauxval(AT_HWCAP) & kHwcapDotprod) != 0;
    f.i8mm = (getauxval(AT_HWCAP2) & kHwcap2I8mm) != 0;
#endif
    return f;
}

} // namespace

const CpuFeatures &cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

} // namespace tautorch
