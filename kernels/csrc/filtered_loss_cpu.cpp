// The C ABI of the losses by filters on the CPU: checks, workspace, threads, and the choice of the
// build of filtered_loss_face.cpp that this processor can run.
#include "filtered_loss_run.cuh"
#include "processor.h"
#include "status.h"
#include "threads.h"

namespace {

constexpr int64_t kMaxNumbers = int64_t{1} << 48;  // of all pictures: no size overflows
constexpr int32_t kMaxTeams = 1 << 16;
constexpr int kRoomAlignment = 64;

// The best build for this processor.
mien::FilteredLossPlanes best_build() {
#if defined(__x86_64__)
    if (mien::may_use_avx2()) return mien::filtered_loss_face_avx2;
#endif
    return mien::filtered_loss_face_baseline;
}

mien_status check_sizes(const mien_filtered_loss_job &job) {
    using mien::fail;
    if (job.kind < MIEN_PIXEL_GRADIENT_DIFF || job.kind > MIEN_MS_SSIM)
        return fail(MIEN_INVALID_ARGUMENT, "unknown loss %d", job.kind);
    if (job.faces < 1 || job.channels < 1 || job.channels > 4 || job.size < 1 ||
        job.size > MIEN_MAX_PICTURE_PX)
        return fail(MIEN_INVALID_ARGUMENT,
                    "faces must be at least 1, channels 1..4, size 1..%d, got %lld, %d, %d",
                    MIEN_MAX_PICTURE_PX, static_cast<long long>(job.faces), job.channels, job.size);
    const int64_t most = kMaxNumbers / (int64_t{job.size} * job.size * job.channels);
    if (job.faces > most)
        return fail(MIEN_INVALID_ARGUMENT, "faces must be at most %lld of this size, got %lld",
                    static_cast<long long>(most), static_cast<long long>(job.faces));
    if (job.num_teams < 1 || job.num_teams > kMaxTeams)
        return fail(MIEN_INVALID_ARGUMENT, "num_teams must be 1..%d, got %d", kMaxTeams,
                    job.num_teams);
    return MIEN_OK;
}

// Whether filter number i maps from one size to the other, in no more taps than there are numbers.
mien_status check_filter(const mien_filtered_loss_job &job, int i, int from_size, int size) {
    const mien_filter &filter = job.filters[i];
    if (filter.size == size && filter.from_size == from_size && filter.num_taps >= 1 &&
        filter.num_taps <= from_size && filter.num_turned >= 1 && filter.num_turned <= size)
        return MIEN_OK;
    return mien::fail(
        MIEN_INVALID_ARGUMENT,
        "filter %d must map %d to %d px in as many taps at most, got %d to %d, %d, %d", i,
        from_size, size, filter.from_size, filter.size, filter.num_taps, filter.num_turned);
}

// Blurs, reductions and enlargements of a pyramid, and the sizes of its levels.
mien_status check_pyramid(const mien_filtered_loss_job &job, int blurs, int steps,
                          mien::FilteredCall *call) {
    call->levels = steps + 1;
    for (int step = 0; step < steps; ++step) {
        const int size = job.filters[blurs + step].size;
        if (size < 1 || size > call->sizes[step])
            return mien::fail(MIEN_INVALID_ARGUMENT, "filter %d must reduce %d px, got %d",
                              blurs + step, call->sizes[step], size);
        call->sizes[step + 1] = size;
    }
    mien_status status = MIEN_OK;
    const auto check = [&](int i, int from_size, int size) {
        if (status == MIEN_OK) status = check_filter(job, i, from_size, size);
    };
    for (int level = 0; level < blurs; ++level)
        check(level, call->sizes[level], call->sizes[level]);
    for (int step = 0; step < steps; ++step) {
        check(blurs + step, call->sizes[step], call->sizes[step + 1]);
        check(blurs + steps + step, call->sizes[step + 1], call->size);
    }
    return status;
}

mien_status check_filters(const mien_filtered_loss_job &job, mien::FilteredCall *call) {
    constexpr int kNumFilters[] = {2, mien::kEdgeFilters, 3 * mien::kLaplacianSteps,
                                   3 * mien::kScales - 2};
    if (job.num_filters != kNumFilters[job.kind])
        return mien::fail(MIEN_INVALID_ARGUMENT, "num_filters must be %d, got %d",
                          kNumFilters[job.kind], job.num_filters);
    call->levels = 1;
    call->sizes[0] = job.size;
    if (job.kind == MIEN_LAPLOSS)
        return check_pyramid(job, mien::kLaplacianSteps, mien::kLaplacianSteps, call);
    if (job.kind == MIEN_MS_SSIM) return check_pyramid(job, mien::kScales, mien::kScales - 1, call);
    for (int i = 0; i < job.num_filters; ++i)
        if (const mien_status status = check_filter(job, i, job.size, job.size)) return status;
    return MIEN_OK;
}

void point_to_bands(const mien_filtered_loss_job &job, mien::FilteredCall *call) {
    const int32_t *first = job.firsts;
    const float *taps = job.taps;
    const auto next = [&](int size, int from_size, int num_taps) {
        const mien::Band band{first, taps, size, from_size, num_taps};
        first += size;
        taps += int64_t{size} * num_taps;
        return band;
    };
    for (int i = 0; i < job.num_filters; ++i) {
        const mien_filter &filter = job.filters[i];
        call->filters[i].forward = next(filter.size, filter.from_size, filter.num_taps);
        call->filters[i].transposed = next(filter.from_size, filter.size, filter.num_turned);
    }
}

// All of the call but its memory.
mien_status measure_job(const mien_filtered_loss_job *job, mien::FilteredCall *call) {
    if (!job) return mien::fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (const mien_status status = check_sizes(*job)) return status;
    *call = mien::FilteredCall{};
    call->num_planes = job->faces * job->channels;
    call->channels = job->channels;
    call->size = job->size;
    call->kind = job->kind;
    if (const mien_status status = check_filters(*job, call)) return status;
    call->numbers = mien::room_numbers(*call);
    return MIEN_OK;
}

int64_t bytes_needed(const mien_filtered_loss_job &job, const mien::FilteredCall &call) {
    return job.num_teams * call.numbers * int64_t{sizeof(float)} + kRoomAlignment;
}

}  // namespace

namespace mien {

mien_status prepare_filtered_loss(const mien_filtered_loss_job *job, void *workspace,
                                  int64_t workspace_bytes, FilteredCall *call) {
    if (const mien_status status = measure_job(job, call)) return status;
    if (!job->pred || !job->target || !job->weight || !job->values || !job->gradient ||
        !job->firsts || !job->taps)
        return fail(MIEN_INVALID_ARGUMENT, "null pointer");
    mien_status status = MIEN_OK;
    const auto check = [&status](const char *name, const void *pointer) {
        if (status == MIEN_OK) status = check_aligned(name, pointer, alignof(float));
    };
    check("pred", job->pred);
    check("target", job->target);
    check("weight", job->weight);
    check("values", job->values);
    check("gradient", job->gradient);
    check("firsts", job->firsts);
    check("taps", job->taps);
    if (status != MIEN_OK) return status;
    status = check_workspace(workspace, workspace_bytes, bytes_needed(*job, *call));
    if (status != MIEN_OK) return status;
    call->pred = job->pred;
    call->target = job->target;
    call->weight = job->weight;
    call->values = job->values;
    call->gradient = job->gradient;
    const auto begin = reinterpret_cast<uintptr_t>(workspace);
    const uintptr_t past = begin % kRoomAlignment;
    call->rooms = reinterpret_cast<float *>(static_cast<char *>(workspace) +
                                            (past ? kRoomAlignment - past : 0));
    point_to_bands(*job, call);
    return MIEN_OK;
}

}  // namespace mien

int64_t mien_filtered_loss_workspace_bytes(const mien_filtered_loss_job *job) {
    mien::FilteredCall call{};
    return measure_job(job, &call) == MIEN_OK ? bytes_needed(*job, call) : 0;
}

mien_status mien_filtered_loss_cpu(const mien_filtered_loss_job *job, void *workspace,
                                   int64_t workspace_bytes) {
    constexpr int kAtOnce = mien::kPlanesAtOnce;
    mien::FilteredCall call{};
    const mien_status status = mien::prepare_filtered_loss(job, workspace, workspace_bytes, &call);
    if (status != MIEN_OK) return status;
    if (job->num_teams % kAtOnce != 0)
        return mien::fail(MIEN_INVALID_ARGUMENT, "num_teams must be a multiple of %d, got %d",
                          kAtOnce, job->num_teams);
    const mien::FilteredLossPlanes planes_of = best_build();
    mien::for_each((call.num_planes + kAtOnce - 1) / kAtOnce, job->num_teams / kAtOnce,
                   [&](int64_t group, int worker) {
                       planes_of(call, group * kAtOnce,
                                 call.rooms + worker * kAtOnce * call.numbers);
                   });
    return MIEN_OK;
}

#ifndef MIEN_WITH_CUDA
mien_status mien_filtered_loss_cuda(const mien_filtered_loss_job *, void *, int64_t, void *) {
    return mien::fail(MIEN_NOT_BUILT, "libmien was built without CUDA; build it where nvcc is");
}
#endif
