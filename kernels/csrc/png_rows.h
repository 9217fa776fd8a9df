// What the builds of png_rows_face.cpp share with the call that checks a job.
#pragma once

#include "mien.h"

namespace mien {

// False where a row says a filter that PNG does not have. `above`: a row of pixels of 4 numbers.
using PngRows = bool (*)(const mien_png_job &job, int32_t *above);
bool png_rows_face_baseline(const mien_png_job &job, int32_t *above);
bool png_rows_face_avx2(const mien_png_job &job, int32_t *above);

}  // namespace mien
