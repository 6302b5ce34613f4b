#include "core/parallel.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <pthread.h>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__) // GCC
#define TT_ADDRESS_SANITIZER 1
#elif defined(__has_feature) // Clang
#define TT_ADDRESS_SANITIZER __has_feature(address_sanitizer)
#else
#define TT_ADDRESS_SANITIZER 0
#endif

namespace tautorch {
namespace {

std::atomic<ParallelForFn> pool_for{nullptr};
std::atomic<NumThreadsFn> pool_threads{nullptr};
std::atomic<bool> forked_child{false};

void mark_child() { forked_child.store(true, std::memory_order_relaxed); }

// No exception may leave through the pool's C interface, which would turn it into a return code.
struct Guarded {
    RangeFn fn;
    void *ctx;
    std::atomic<bool> out_of_memory{false};
};

std::atomic<int64_t> allocations{0};

struct Buffers {
    void *data[static_cast<int>(Scratch::count)];
    size_t size[static_cast<int>(Scratch::count)];
    int spared[static_cast<int>(Scratch::count)]; // requests in a row that took little of a large buffer
    void free() {
        for (void *p : data)
            std::free(p);
        *this = {};
    }
};

// Trivial: what is called after the thread's destructors (atexit) still finds it, empty.
struct Local {
    Buffers buffers;
    Buffers *apart;         // in place of these, or null
    const Guarded *waiting; // whose tasks this thread handed out and waits for
};
thread_local Local local;

struct FreeAtEnd {
    ~FreeAtEnd() { local.buffers.free(); }
};

// A pool may have a thread that waits for its tasks do other work, which must not take the buffers that the
// waiting one has in use.
struct OtherWork {
    Buffers own = {};
    const Local before = local;
    OtherWork() {
        local.apart = &own;
        local.waiting = nullptr;
    }
    ~OtherWork() {
        own.free();
        local.apart = before.apart;
        local.waiting = before.waiting;
    }
    OtherWork(const OtherWork &) = delete;
    OtherWork &operator=(const OtherWork &) = delete;
};

void guarded(int64_t begin, int64_t end, void *ctx) {
    Guarded &g = *static_cast<Guarded *>(ctx);
    try {
        if (local.waiting && local.waiting != &g) {
            const OtherWork apart;
            g.fn(begin, end, g.ctx);
        } else {
            g.fn(begin, end, g.ctx);
        }
    } catch (const std::bad_alloc &) { // of scratch(); kernels throw nothing else
        g.out_of_memory.store(true, std::memory_order_relaxed);
    }
}

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
    Guarded g{fn, ctx};
    const Guarded *const before = local.waiting;
    local.waiting = &g;
    const int32_t code = f(0, n, 1, guarded, &g);
    local.waiting = before;
    if (g.out_of_memory.load(std::memory_order_relaxed))
        throw std::bad_alloc();
    if (code != 0)
        throw std::runtime_error("the thread pool failed, code " + std::to_string(code));
}

void request(RangeFn fn, void *ctx) {
    if (local.waiting) {
        const OtherWork apart;
        fn(0, 1, ctx);
    } else {
        fn(0, 1, ctx);
    }
}

} // namespace detail

int64_t scratch_allocations() { return allocations.load(std::memory_order_relaxed); }

uint64_t read_lines(const uint8_t *p, int64_t bytes) {
    constexpr int64_t kLine = 64, kStreams = 4;
    const int64_t lines = bytes / kLine, tasks = max_threads();
    std::atomic<uint64_t> total{0};
    parallel_tasks(tasks, [&](int64_t t) {
        const int64_t end = lines * (t + 1) / tasks;
        uint64_t sum[kStreams] = {};
        int64_t i = lines * t / tasks;
        const auto word = [p](int64_t line) {
            uint64_t w;
            std::memcpy(&w, p + line * kLine, sizeof w);
            return w;
        };
        for (; i + kStreams <= end; i += kStreams)
            for (int64_t s = 0; s < kStreams; ++s)
                sum[s] += word(i + s);
        for (; i < end; ++i)
            sum[0] += word(i);
        total += sum[0] + sum[1] + sum[2] + sum[3];
    });
    return total.load();
}

void *scratch(Scratch slot, size_t bytes) {
    Buffers &buffers = local.apart ? *local.apart : local.buffers;
    const int i = static_cast<int>(slot);
#if TT_ADDRESS_SANITIZER
    // A new buffer of the very size at each call: a step past its end, or a use of a slot that was asked for
    // again since, is then an error.
    constexpr bool fits = false;
    const size_t want = bytes;
#else
    bool fits = buffers.size[i] >= bytes;
    // One image of 8K must not cost its memory for ever: what was large is given back after as many small
    // requests as no network has layers.
    constexpr size_t kLarge = size_t{16} << 20;
    constexpr int kPatience = 1000;
    if (buffers.size[i] <= kLarge || bytes > buffers.size[i] / 4)
        buffers.spared[i] = 0;
    else if (++buffers.spared[i] > kPatience)
        fits = false;
    // Half as much again, so that slowly growing batches do not reallocate at every call.
    const size_t want = bytes + bytes / 2;
#endif
    if (!fits) {
        void *fresh = nullptr;
        if (posix_memalign(&fresh, 64, want) != 0)
            throw std::bad_alloc();
        static thread_local FreeAtEnd at_end;
        (void)&at_end;
        allocations.fetch_add(1, std::memory_order_relaxed);
        std::free(buffers.data[i]);
        buffers.spared[i] = 0;
        buffers.data[i] = fresh;
        buffers.size[i] = want;
    }
    return buffers.data[i];
}

} // namespace tautorch
