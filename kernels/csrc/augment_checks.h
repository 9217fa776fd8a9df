// What a job must be before either device works on it; the reason goes to mien_last_error.
#pragma once

#include "mien.h"

namespace mien {

constexpr int kMinSizePx = 8, kMaxSizePx = 4096, kMaxClaheSize = 8;
constexpr float kMaxRange = 1000;  // percent or degrees

mien_status check_draw(const mien_ranges *ranges, const mien_draw_job *job);

// Sizes, counts and types.
mien_status check_job(const mien_augment_job *job);

// That no pointer is null, `mask` aside, and each is aligned to what it points to.
mien_status check_pointers(const mien_augment_job *job);

// Which kernels a GPU launches besides those of every job.
struct Launches {
    bool outputs;   // an output has another size than the store
    int landmarks;  // triangles and map, where faces are warped to landmarks
    bool warp;      // the warp fills a picture of its own, as `input` cannot make it on the way
};

Launches launches_of(const mien_augment_job &job);

}  // namespace mien
