// What the builds of shrink_face.cpp share with the call that checks a job.
#pragma once

#include "mien.h"

namespace mien {

// Which pixels of the picture each pixel of the smaller one covers along one direction, and how
// much each of them counts: `taps` of them from `first` on, the last ones perhaps with nothing.
struct Covers {
    const int32_t *first;  // [size]
    const float *weights;  // [size, taps]
    int32_t taps;
};

// `room`: pixels of 4 numbers, `edge` + `taps` of zeros and then twice `size` of any.
using Shrink = void (*)(const mien_shrink_job &job, Covers covers, float *room);
void shrink_face_baseline(const mien_shrink_job &job, Covers covers, float *room);
void shrink_face_avx2(const mien_shrink_job &job, Covers covers, float *room);

}  // namespace mien
