#pragma once

#include <stddef.h>
#include <stdint.h>

#include "mien.h"

namespace mien {

constexpr size_t kWorkspaceAlignment = 16;

inline bool starts_at(const void *pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Record why a call failed (printf style) and hand its status back to the caller.
mien_status fail(mien_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Whether a job's memory is there, large enough and aligned.
mien_status check_workspace(const void *workspace, int64_t given_bytes, int64_t needed_bytes);

// Whether a pointer of a job is aligned, as null is; `name` says which.
mien_status check_aligned(const char *name, const void *pointer, size_t bytes);

// Bytes of one number of a mien_type.
inline size_t bytes_of(int32_t type) { return type == MIEN_FLOAT32 ? 4 : 2; }

}  // namespace mien
