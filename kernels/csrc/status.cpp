#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local char last_error[256] = "";
}

namespace mien {
mien_status fail(mien_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    std::vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}
}  // namespace mien

const char *mien_header_hash(void) { return MIEN_HEADER_HASH; }
const char *mien_last_error(void) { return last_error; }

#ifdef MIEN_WITH_CUDA
int32_t mien_has_cuda(void) { return 1; }
const char *mien_cuda_build(void) { return MIEN_CUDA_BUILD; }
#else
int32_t mien_has_cuda(void) { return 0; }
const char *mien_cuda_build(void) { return ""; }
#endif
