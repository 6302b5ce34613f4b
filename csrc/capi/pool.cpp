#include "capi/pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

namespace tautorch {
namespace {

// Layers of a network follow each other within microseconds; waking a sleeping thread takes tens of them.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(int workers) {
        threads_.reserve(static_cast<size_t>(workers));
        try {
            for (int i = 0; i < workers; ++i)
                threads_.emplace_back([this] { work(); });
        } catch (...) {
            stop();
            throw;
        }
    }
    ~Pool() { stop(); }
    Pool(const Pool &) = delete;

    int threads() const { return static_cast<int>(threads_.size()) + 1; }

    void run(int64_t begin, int64_t end, RangeFn fn, void *context) {
        std::unique_lock<std::mutex> only(job_, std::try_to_lock);
        if (!only.owns_lock()) // another caller's job, or a job within a job
            return fn(begin, end, context);
        fn_ = fn;
        context_ = context;
        end_ = end;
        next_.store(begin, std::memory_order_relaxed);
        busy_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
        {
            const std::lock_guard<std::mutex> lock(sleep_);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        claim();
        // Workers have at most one item left each.
        for (int i = 0; busy_.load(std::memory_order_acquire) > 0; ++i)
            i < kSpins ? pause() : std::this_thread::yield();
    }

  private:
    void claim() {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < end_;)
            fn_(i, i + 1, context_);
    }

    void work() {
        for (uint64_t seen = 0;;) {
            for (int i = 0; i < kSpins && round_.load(std::memory_order_acquire) == seen; ++i)
                pause();
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
            }
            seen = round_.load(std::memory_order_acquire);
            if (ended_.load(std::memory_order_relaxed))
                return;
            claim();
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    void stop() {
        {
            const std::lock_guard<std::mutex> lock(sleep_);
            ended_.store(true, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (std::thread &t : threads_)
            t.join();
        threads_.clear();
    }

    std::mutex job_;
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> round_{0};
    std::atomic<bool> ended_{false};
    std::atomic<int> busy_{0};
    std::atomic<int64_t> next_{0};
    int64_t end_ = 0;
    RangeFn fn_ = nullptr;
    void *context_ = nullptr;
    std::vector<std::thread> threads_;
};

// Never destroyed at exit, nor by a forked child, which has none of its threads to join.
Pool *pool = nullptr;
pid_t owner = 0;

int32_t parallel_for(int64_t begin, int64_t end, int64_t, RangeFn fn, void *context) {
    pool->run(begin, end, fn, context);
    return 0;
}

int32_t num_threads(uint32_t *count) {
    *count = static_cast<uint32_t>(pool->threads());
    return 0;
}

} // namespace

void start_pool(int n) {
    std::unique_ptr<Pool> fresh(n > 1 ? new Pool(n - 1) : nullptr);
    set_thread_pool(fresh ? parallel_for : nullptr, fresh ? num_threads : nullptr);
    if (owner == getpid())
        delete pool;
    pool = fresh.release();
    owner = getpid();
}

} // namespace tautorch
