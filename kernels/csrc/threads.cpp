#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

constexpr int kMaxThreads = 1024;

struct Pool {
    std::mutex busy;  // held by the caller whose items the workers are on
    std::mutex mutex;
    std::condition_variable start, done;
    uint64_t round = 0;
    int num_workers = 0;  // worker 0 is the caller
    int wanted = 0;       // of them take part in this round
    int running = 0;
    int64_t count = 0;
    std::atomic<int64_t> next{0};
    const std::function<void(int64_t, int)> *task = nullptr;

    void work(int worker) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            (*task)(item, worker);
    }

    void serve(int worker, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            start.wait(lock, [&] { return round != seen; });
            seen = round;
            if (worker > wanted) continue;
            lock.unlock();
            work(worker);
            lock.lock();
            if (--running == 0) done.notify_one();
        }
    }
};

// Never freed: its threads wait for work until the process ends. A forked child has none of them
// and starts with a pool of its own.
std::atomic<Pool *> pool{nullptr};

Pool &this_process_pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)registered;
    Pool *found = pool.load();
    if (found) return *found;
    Pool *made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
}

}  // namespace

namespace mien {

int resolve_threads(int32_t num_threads) {
    if (num_threads > 0) return num_threads < kMaxThreads ? num_threads : kMaxThreads;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
    const unsigned cores = std::thread::hardware_concurrency();
    return cores ? static_cast<int>(cores) : 1;
}

void for_each(int64_t count, int num_threads, const std::function<void(int64_t, int)> &task) {
    int helpers = static_cast<int>(num_threads < count ? num_threads : count) - 1;
    Pool *shared = helpers > 0 ? &this_process_pool() : nullptr;
    std::unique_lock<std::mutex> busy;
    if (shared) busy = std::unique_lock<std::mutex>(shared->busy, std::try_to_lock);
    if (!busy.owns_lock()) {
        for (int64_t item = 0; item < count; ++item) task(item, 0);
        return;
    }
    std::unique_lock<std::mutex> lock(shared->mutex);
    try {
        while (shared->num_workers < helpers) {
            const int worker = shared->num_workers + 1;
            const uint64_t seen = shared->round;
            std::thread([shared, worker, seen] { shared->serve(worker, seen); }).detach();
            shared->num_workers = worker;
        }
    } catch (const std::system_error &) {
        helpers = shared->num_workers;  // no more threads to be had: the same result, later
    }
    shared->task = &task;
    shared->count = count;
    shared->next.store(0);
    shared->wanted = shared->running = helpers;
    ++shared->round;
    lock.unlock();
    shared->start.notify_all();
    shared->work(0);
    lock.lock();
    shared->done.wait(lock, [&] { return shared->running == 0; });
}

}  // namespace mien
