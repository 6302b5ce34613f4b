#include "kernels/common/isa.h"

#include "core/arch.h"

#include <cstring>

namespace tautorch {

#if defined(__x86_64__)
namespace {
Isa with_amx(Isa isa) {
    isa.name = "amx";
    isa.id = 7;
    isa.product_i8 = product_i8_amx;
    isa.peak_i8 = peak_i8_amx;
    isa.even_rows = even_rows_amx;
    isa.signed_rows = true;
    isa.own_rows = 32; // 16 rows take as long as 8
    return isa;
}
} // namespace
// Here, where nothing is compiled with wide instructions: it is made when the library is loaded.
const Isa isa_amx = with_amx(isa_avx512vnni);
#endif

const IsaEntry *isa_table(int *count) {
    static const CpuFeatures &f = cpu_features();
    static const IsaEntry table[] = {
        {&isa_scalar, true},
#if defined(__x86_64__)
        {&isa_avx2, f.avx2}, {&isa_avxvnni, f.avx2 && f.avx_vnni}, {&isa_avx512vnni, f.avx512_vnni},
        {&isa_amx, f.amx},
#elif defined(__aarch64__)
        {&isa_neon, true},
        {&isa_neon_dotprod, f.dotprod},
        {&isa_neon_i8mm, f.dotprod && f.i8mm},
#endif
    };
    (void)f;
    *count = static_cast<int>(sizeof table / sizeof table[0]);
    return table;
}

const Isa *find_isa(const char *name) {
    int n = 0;
    const IsaEntry *t = isa_table(&n);
    for (int i = 0; i < n; ++i)
        if (std::strcmp(t[i].isa->name, name) == 0)
            return t[i].isa;
    return nullptr;
}

const Isa *find_isa(int32_t id) {
    int n = 0;
    const IsaEntry *t = isa_table(&n);
    for (int i = 0; i < n; ++i)
        if (t[i].isa->id == id)
            return t[i].isa;
    return nullptr;
}

bool isa_supported(const Isa &isa) {
    int n = 0;
    const IsaEntry *t = isa_table(&n);
    for (int i = 0; i < n; ++i)
        if (t[i].isa == &isa)
            return t[i].supported;
    return false;
}

} // namespace tautorch
