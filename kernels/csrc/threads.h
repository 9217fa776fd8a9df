// A small pool of CPU threads, made at the first use and anew in a forked process.
#pragma once

#include <stdint.h>

#include <functional>

namespace mien {

// Threads for 0 = "as many as this process may use".
int resolve_threads(int32_t num_threads);

// Run task(item, worker) for each item of 0 ... count - 1 on up to num_threads threads, the caller
// being worker 0; returns when all are done. Several callers may run at once: the second uses its
// own thread alone.
void for_each(int64_t count, int num_threads, const std::function<void(int64_t, int)> &task);

}  // namespace mien
