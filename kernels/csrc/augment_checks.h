// What a job must be before either device works on it; the reason goes to mien_last_error.
#pragma once

#include "mien.h"

namespace mien {

constexpr int kMinSizePx = 8, kMaxSizePx = 4096, kMaxClaheSize = 8;

mien_status check_draw(const mien_ranges *ranges, int32_t side, int64_t count, int64_t num_faces,
                       int32_t size_px, const void *params);

// Sizes, counts and types.
mien_status check_job(const mien_augment_job *job);

// That no pointer is null; `mask` may be.
mien_status check_pointers(const mien_augment_job *job);

}  // namespace mien
