#include "core/parallel.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <pthread.h>

namespace tautorch {
namespace {

std::atomic<ParallelForFn> pool_for{nullptr};
std::atomic<NumThreadsFn> pool_threads{nullptr};
std::atomic<bool> forked_child{false};

void mark_child() { forked_child.store(true, std::memory_order_relaxed); }

struct Buffers {
    void *data[static_cast<int>(Scratch::count)] = {};
    size_t size[static_cast<int>(Scratch::count)] = {};
    ~Buffers() {
        for (void *p : data)
            std::free(p);
    }
};

} // namespace

void set_thread_pool(ParallelForFn parallel_for, NumThreadsFn num_threads) {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, mark_child); });
    pool_threads.store(num_threads, std::memory_order_relaxed);
    pool_for.store(num_threads ? parallel_for : nullptr, std::memory_order_release);
}

int64_t max_threads() {
    if (!pool_for.load(std::memory_order_acquire) || forked_child.load(std::memory_order_relaxed))
        return 1;
    uint32_t n = 1;
    if (pool_threads.load(std::memory_order_relaxed)(&n) != 0 || n == 0)
        return 1;
    return n;
}

namespace detail {

void run_tasks(int64_t n, RangeFn fn, void *ctx) {
    if (n <= 0)
        return;
    const ParallelForFn f = pool_for.load(std::memory_order_acquire);
    if (!f || forked_child.load(std::memory_order_relaxed)) {
        fn(0, n, ctx);
        return;
    }
    f(0, n, 1, fn, ctx);
}

} // namespace detail

void *scratch(Scratch slot, size_t bytes) {
    static thread_local Buffers buffers;
    const int i = static_cast<int>(slot);
    if (buffers.size[i] < bytes) {
        // Grow by half at least, so that slowly growing batches do not reallocate at every call.
        size_t want = bytes + bytes / 2;
        want = (want + 63) / 64 * 64;
        void *fresh = std::aligned_alloc(64, want);
        if (!fresh)
            throw std::bad_alloc();
        std::free(buffers.data[i]);
        buffers.data[i] = fresh;
        buffers.size[i] = want;
    }
    return buffers.data[i];
}

} // namespace tautorch
