// Memory that is written once and then streamed again and again.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tautorch {

// Asks for huge pages where whole ones lie inside [p, p + bytes). Call before the memory is first touched.
// Weights of some megabytes are read a page after another at every call, and hardware prefetchers stop at
// each page's end.
inline void advise_huge_pages(void *p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t{2} << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHuge * kHuge;
    if (begin < end)
        madvise(reinterpret_cast<void *>(begin), end - begin,
                MADV_HUGEPAGE); // advice: failure changes nothing
#else
    (void)p;
    (void)bytes;
#endif
}

} // namespace tautorch
