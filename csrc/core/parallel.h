// Threads and scratch memory. Work runs in the host's pool (torch's), which is handed over as a pointer:
// the extension starts no thread of its own and links no OpenMP.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tautorch {

using RangeFn = void (*)(int64_t begin, int64_t end, void *ctx);
// The C symbols torch_parallel_for and torch_get_num_threads of libtorch_cpu (torch >= 2.10).
using ParallelForFn = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void *ctx);
using NumThreadsFn = int32_t (*)(uint32_t *out);

// Either pointer null: everything runs on the calling thread.
void set_thread_pool(ParallelForFn parallel_for, NumThreadsFn num_threads);

// Threads the pool would use; 1 without a pool and in a forked child, where the parent's pool would hang.
int64_t max_threads();

namespace detail {
void run_tasks(int64_t n, RangeFn fn, void *ctx);
void request(RangeFn fn, void *ctx);
} // namespace detail

// Calls f(i) for i in [0, n), each i once, spread over the pool. f throws nothing but std::bad_alloc, which
// is thrown again here; then some i have not run.
template <class F> void parallel_tasks(int64_t n, const F &f) {
    if (n == 1) {
        f(int64_t{0});
        return;
    }
    detail::run_tasks(
        n,
        [](int64_t begin, int64_t end, void *ctx) {
            const F &body = *static_cast<const F *>(ctx);
            for (int64_t i = begin; i < end; ++i)
                body(i);
        },
        const_cast<F *>(&f));
}

// Calls f(), a whole request, which a pool may have begun on a thread that waits for another one's tasks.
template <class F> void as_request(const F &f) {
    detail::request([](int64_t, int64_t, void *ctx) { (*static_cast<const F *>(ctx))(); },
                    const_cast<F *>(&f));
}

// The sum of the first word of every whole cache line, read by all threads of the pool.
uint64_t read_lines(const uint8_t *p, int64_t bytes);

// Thread-local scratch, 64-byte aligned, kept between calls: the kernels' only memory of their own. Buffers
// of different slots are distinct; asking for a slot again may move it. Throws std::bad_alloc.
enum class Scratch { rows, scales, tile, panel, inner, inner_scales, pointers, image, even, count };
void *scratch(Scratch slot, size_t bytes);
// How often, on all threads, a buffer had to be allocated.
int64_t scratch_allocations();

} // namespace tautorch
