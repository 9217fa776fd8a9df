// The C ABI of Winograd's transforms: checks, threads, and the choice of the build of
// winograd_face.cpp that this processor can run.
#include "processor.h"
#include "status.h"
#include "threads.h"
#include "winograd.h"

namespace {

constexpr int64_t kMaxNumbers = int64_t{1} << 40;  // of a tensor: no size overflows
constexpr int64_t kItemsAtOnce = 16;

mien::WinogradItems best_build() {
#if defined(__x86_64__)
    if (mien::may_use_avx2()) return mien::winograd_face_avx2;
#endif
    return mien::winograd_face_baseline;
}

bool is_of_kernel(int32_t transform) {
    return transform == MIEN_WINOGRAD_KERNEL || transform == MIEN_WINOGRAD_KERNEL_GRADIENT;
}

// Rows or columns of the result of a 3x3 convolution of a picture.
int64_t result_of(int64_t size, int32_t padding) { return size + 2 * padding - 2; }

mien_status check_sizes(const mien_winograd_job &job) {
    if (job.transform < MIEN_WINOGRAD_INPUT || job.transform > MIEN_WINOGRAD_KERNEL_GRADIENT)
        return mien::fail(MIEN_INVALID_ARGUMENT, "unknown transform %d", job.transform);
    if (job.count < 1 || job.channels < 1 || job.count > kMaxNumbers / job.channels)
        return mien::fail(MIEN_INVALID_ARGUMENT,
                          "count and channels must be at least 1 and at most 2^40 together");
    if (is_of_kernel(job.transform)) return MIEN_OK;
    if (job.padding < 0 || job.padding > 2)
        return mien::fail(MIEN_INVALID_ARGUMENT, "padding must be 0..2, got %d", job.padding);
    const int least = job.transform == MIEN_WINOGRAD_INPUT ? 4 - 2 * job.padding : 2;
    if (job.rows < least || job.rows < 1 || job.columns < least || job.columns < 1 ||
        job.rows % 2 != 0 || job.columns % 2 != 0)
        return mien::fail(MIEN_INVALID_ARGUMENT,
                          "rows and columns must be even and at least %d, got %d and %d", least,
                          job.rows, job.columns);
    const int64_t most = kMaxNumbers / (int64_t{job.rows} * job.columns) / job.channels;
    if (job.count > most)
        return mien::fail(MIEN_INVALID_ARGUMENT, "count must be at most %lld of this size",
                          static_cast<long long>(most));
    return MIEN_OK;
}

}  // namespace

mien_status mien_winograd_cpu(const mien_winograd_job *job) {
    if (!job || !job->pixels || !job->tiles)
        return mien::fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (const mien_status status = check_sizes(*job)) return status;
    mien_status status = mien::check_aligned("pixels", job->pixels, alignof(float));
    if (status == MIEN_OK) status = mien::check_aligned("tiles", job->tiles, alignof(float));
    if (status != MIEN_OK) return status;

    mien::WinogradCall call{};
    call.pixels = job->pixels;
    call.tiles = job->tiles;
    call.rows = job->rows;
    call.columns = job->columns;
    call.channels = job->channels;
    call.transform = job->transform;
    call.is_turned = job->is_turned != 0;
    call.num_tiles = job->count;
    if (!is_of_kernel(job->transform)) {
        const bool is_input = job->transform == MIEN_WINOGRAD_INPUT;
        call.padding = is_input ? job->padding : 0;
        call.tile_rows = (is_input ? result_of(job->rows, job->padding) : job->rows) / 2;
        call.tile_columns = (is_input ? result_of(job->columns, job->padding) : job->columns) / 2;
        call.num_tiles *= call.tile_rows * call.tile_columns;
    }
    const mien::WinogradItems items_of = best_build();
    const int64_t groups = (call.num_tiles + kItemsAtOnce - 1) / kItemsAtOnce;
    mien::for_each(groups, mien::resolve_threads(job->num_threads), [&](int64_t group, int) {
        const int64_t first = group * kItemsAtOnce, end = first + kItemsAtOnce;
        items_of(call, first, end < call.num_tiles ? end : call.num_tiles);
    });
    return MIEN_OK;
}
