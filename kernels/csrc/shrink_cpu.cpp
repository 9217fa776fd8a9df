// The C ABI of making a picture smaller: checks, what each pixel covers, and the choice of a build.
#include <math.h>

#include <algorithm>
#include <new>
#include <vector>

#include "processor.h"
#include "shrink.h"
#include "status.h"

namespace {

constexpr int kNumbersOfPixel = 4;
constexpr double kLeastPart = 1e-3;  // of a pixel; less is left out, as OpenCV does

mien::Shrink best_build() {
#if defined(__x86_64__)
    if (mien::may_use_avx2()) return mien::shrink_face_avx2;
#endif
    return mien::shrink_face_baseline;
}

// Pixel `to` covers the pixels from begin to end, of which the outermost may be covered in part.
void cover(int32_t edge, int32_t to, double scale, int32_t *first, float *weights) {
    const double begin = to * scale, end = begin + scale;
    const double width = std::min(scale, edge - begin);
    const int32_t last = std::min(static_cast<int32_t>(floor(end)), edge - 1);
    *first = std::min(static_cast<int32_t>(ceil(begin)), last);
    const double part_before = *first - begin, part_behind = end - last;
    // Divided in double precision and rounded once: with OpenCV's weights come OpenCV's bytes.
    const auto add = [&](double part) { *weights++ = static_cast<float>(part / width); };
    const int32_t num_whole = last - *first;
    if (part_before > kLeastPart) {
        --*first;
        add(part_before);
    }
    for (int32_t i = 0; i < num_whole; ++i) add(1.0);
    if (part_behind > kLeastPart) add(std::min(std::min(part_behind, 1.0), width));
}

void shrink(const mien_shrink_job &job) {
    const double scale = 1.0 / (static_cast<double>(job.size) / job.edge);
    const int32_t taps = static_cast<int32_t>(ceil(scale)) + 1;
    const size_t size = job.size;
    std::vector<int32_t> first(size);
    std::vector<float> weights(size * taps);
    for (int32_t to = 0; to < job.size; ++to)
        cover(job.edge, to, scale, &first[to], &weights[size_t(to) * taps]);
    std::vector<float> room(kNumbersOfPixel * (job.edge + taps + 2 * size));
    best_build()(job, {first.data(), weights.data(), taps}, room.data());
}

}  // namespace

mien_status mien_shrink_cpu(const mien_shrink_job *job) {
    if (!job || !job->picture || !job->smaller)
        return mien::fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (job->edge > MIEN_MAX_SHRUNK_PX || job->size < 1 || job->size >= job->edge)
        return mien::fail(MIEN_INVALID_ARGUMENT,
                          "edge must be at most %d and size 1..edge - 1, got %d and %d",
                          MIEN_MAX_SHRUNK_PX, job->edge, job->size);
    if (job->row_bytes < int64_t{3} * job->edge)
        return mien::fail(MIEN_INVALID_ARGUMENT, "row_bytes must hold %d pixels, got %lld",
                          job->edge, static_cast<long long>(job->row_bytes));
    try {
        shrink(*job);
    } catch (const std::bad_alloc &) {
        return mien::fail(MIEN_OUT_OF_MEMORY, "no memory for a row");
    }
    return MIEN_OK;
}
