// The C ABI of a PNG's rows: checks, and the choice of the build that this processor can run.
#include <memory>
#include <new>

#include "png_rows.h"
#include "processor.h"
#include "status.h"

namespace {

constexpr int kNumbersOfPixel = 4;

mien::PngRows best_build() {
#if defined(__x86_64__)
    if (mien::may_use_avx2()) return mien::png_rows_face_avx2;
#endif
    return mien::png_rows_face_baseline;
}

}  // namespace

mien_status mien_png_rows_cpu(const mien_png_job *job) {
    if (!job || !job->filtered || !job->pixels)
        return mien::fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (job->rows < 1 || job->rows > MIEN_MAX_PNG_PX || job->columns < 1 ||
        job->columns > MIEN_MAX_PNG_PX)
        return mien::fail(MIEN_INVALID_ARGUMENT, "rows and columns must be 1..%d, got %d and %d",
                          MIEN_MAX_PNG_PX, job->rows, job->columns);
    const std::unique_ptr<int32_t[]> above(new (std::nothrow)
                                               int32_t[kNumbersOfPixel * job->columns]);
    if (!above) return mien::fail(MIEN_OUT_OF_MEMORY, "no memory for a row");
    if (!best_build()(*job, above.get()))
        return mien::fail(MIEN_INVALID_ARGUMENT, "a row has no filter of PNG");
    return MIEN_OK;
}
