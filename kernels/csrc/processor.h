// What this processor can run.
#pragma once

#include <cstdlib>
#include <cstring>

namespace mien {

#if defined(__x86_64__)
// Whether the builds for AVX2 may be used; MIEN_CPU=baseline forbids it, for tests.
inline bool may_use_avx2() {
    const char *limit = std::getenv("MIEN_CPU");
    const bool is_baseline = limit && std::strcmp(limit, "baseline") == 0;
    return !is_baseline && __builtin_cpu_supports("x86-64-v3");
}
#endif

}  // namespace mien
