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

mien_status check_workspace(const void *workspace, int64_t given_bytes, int64_t needed_bytes) {
    if (workspace && given_bytes >= needed_bytes && starts_at(workspace, kWorkspaceAlignment))
        return MIEN_OK;
    return fail(MIEN_INVALID_ARGUMENT,
                "workspace must have %lld bytes and start at a whole %zu, got %lld at %p",
                static_cast<long long>(needed_bytes), kWorkspaceAlignment,
                static_cast<long long>(workspace ? given_bytes : 0), workspace);
}

mien_status check_aligned(const char *name, const void *pointer, size_t bytes) {
    if (starts_at(pointer, bytes)) return MIEN_OK;
    return fail(MIEN_INVALID_ARGUMENT, "%s must be aligned to %zu bytes, got %p", name, bytes,
                pointer);
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
