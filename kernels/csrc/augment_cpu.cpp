// The C ABI of the augmentation on the CPU: checks, tables, threads, and the choice of the build of
// augment_face.cpp that this processor can run.
#include <atomic>
#include <memory>
#include <new>

#include "augment.cuh"
#include "augment_checks.h"
#include "augment_face.h"
#include "draw.cuh"
#include "processor.h"
#include "status.h"
#include "threads.h"

namespace {

constexpr mien::ColorTables kColors = mien::make_color_tables();
constexpr mien::LabTables kLab = mien::make_lab_tables(kColors);

mien::LevelTables make_level_tables() {
    mien::LevelTables tables;
    for (int level = 0; level < 256; ++level) {
        const float value = mien::unit_level(level);
        tables.float32[level] = mien::float_bits(value);
        tables.bfloat16[level] = mien::bfloat16_bits(value);
        tables.float16[level] = mien::float16_bits(value);
    }
    return tables;
}

// The best build for this processor.
mien::AugmentFace best_build() {
#if defined(__x86_64__)
    if (mien::may_use_avx2()) return mien::augment_face_avx2;
#endif
    return mien::augment_face_baseline;
}

struct Freed {
    void operator()(unsigned char *block) const {
        ::operator delete[](block, std::align_val_t(64));
    }
};

// Scratch of the calling thread; grows, and is kept for its next call.
unsigned char *thread_scratch(size_t bytes) {
    thread_local std::unique_ptr<unsigned char[], Freed> block;
    thread_local size_t held = 0;
    if (held < bytes) {
        block.reset();
        held = 0;
        block.reset(static_cast<unsigned char *>(
            ::operator new[](bytes, std::align_val_t(64), std::nothrow)));
        held = block ? bytes : 0;
    }
    return block.get();
}

// Faces are counted in 31 bits: `nearest` numbers them so, and no offset of a pixel then overflows.
mien_status check_number(const char *name, int64_t number, int64_t least) {
    if (number >= least && number <= INT32_MAX) return MIEN_OK;
    return mien::fail(MIEN_INVALID_ARGUMENT, "%s must be %lld..%d, got %lld", name,
                      static_cast<long long>(least), INT32_MAX, static_cast<long long>(number));
}

// Row `row` of a job, as it is read on a CPU.
mien_status check_face(const mien_augment_job &job, int64_t row) {
    using mien::fail;
    const auto number = static_cast<long long>(row);
    const mien_face &face = job.params[row];
    const int side = mien::side_of(job, row);
    if (face.index < 0 || face.index >= job.num_faces[side])
        return fail(MIEN_INVALID_ARGUMENT, "face %lld: index must be 0..%lld, got %lld", number,
                    static_cast<long long>(job.num_faces[side] - 1),
                    static_cast<long long>(face.index));
    const int max_tiles = mien::clahe_tiles(job.size_px, mien::kMaxClaheSize);
    if (face.clahe_tiles < 0 || face.clahe_tiles > max_tiles)
        return fail(MIEN_INVALID_ARGUMENT, "face %lld: clahe_tiles must be 0..%d, got %d", number,
                    max_tiles, face.clahe_tiles);
    const bool to_landmarks = face.warp == MIEN_WARP_LANDMARKS;
    if (face.warp < MIEN_NO_WARP || face.warp > MIEN_WARP_LANDMARKS ||
        (to_landmarks && !job.to_landmarks))
        return fail(MIEN_INVALID_ARGUMENT,
                    "face %lld: warp must be 0..%d (2 with landmarks alone), got %d", number,
                    MIEN_WARP_LANDMARKS, face.warp);
    if (!to_landmarks) return MIEN_OK;
    if (face.near < 0 || face.near >= MIEN_NEAREST)
        return fail(MIEN_INVALID_ARGUMENT, "face %lld: near must be 0..%d, got %d", number,
                    MIEN_NEAREST - 1, face.near);
    const int64_t last = job.num_faces[1 - side] - 1;
    const int32_t other = job.nearest[side][face.index * MIEN_NEAREST + face.near];
    if (other < 0 || other > last)
        return fail(MIEN_INVALID_ARGUMENT, "face %lld: nearest must be 0..%lld, got %d", number,
                    static_cast<long long>(last), other);
    return MIEN_OK;
}

}  // namespace

namespace mien {

mien_status check_job(const mien_augment_job *job) {
    if (!job) return fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (job->size_px < kMinSizePx || job->size_px > kMaxSizePx)
        return fail(MIEN_INVALID_ARGUMENT, "size_px must be %d..%d, got %d", kMinSizePx, kMaxSizePx,
                    job->size_px);
    if (job->num_sides < 1 || job->num_sides > MIEN_MAX_SIDES)
        return fail(MIEN_INVALID_ARGUMENT, "num_sides must be 1..%d, got %d", MIEN_MAX_SIDES,
                    job->num_sides);
    for (int side = 0; side < job->num_sides; ++side)
        if (const mien_status status = check_number("num_faces", job->num_faces[side], 1))
            return status;
    if (const mien_status status = check_number("count", job->count, 0)) return status;
    if (job->count % job->num_sides != 0)
        return fail(MIEN_INVALID_ARGUMENT, "count must be a multiple of %d (num_sides), got %lld",
                    job->num_sides, static_cast<long long>(job->count));
    if (job->num_outputs < 1 || job->num_outputs > MIEN_MAX_OUTPUTS)
        return fail(MIEN_INVALID_ARGUMENT, "num_outputs must be 1..%d, got %d", MIEN_MAX_OUTPUTS,
                    job->num_outputs);
    if (job->input_px < 1 || job->input_px > job->size_px)
        return fail(MIEN_INVALID_ARGUMENT, "input_px must be 1..%d (size_px), got %d", job->size_px,
                    job->input_px);
    if (job->to_landmarks && job->num_sides != MIEN_MAX_SIDES)
        return fail(MIEN_INVALID_ARGUMENT, "to_landmarks needs both sides");
    if (job->input_channels != 3 && job->input_channels != 8)
        return fail(MIEN_INVALID_ARGUMENT, "input_channels must be 3 or 8, got %d",
                    job->input_channels);
    for (int i = 0; i < job->num_outputs; ++i)
        if (job->output_px[i] < 1 || job->output_px[i] > job->size_px)
            return fail(MIEN_INVALID_ARGUMENT, "output_px must be 1..%d (size_px), got %d",
                        job->size_px, job->output_px[i]);
    for (const int32_t type : {job->input_type, job->target_type})
        if (type < MIEN_FLOAT32 || type > MIEN_FLOAT16)
            return fail(MIEN_INVALID_ARGUMENT, "unknown type %d", type);
    return MIEN_OK;
}

mien_status check_pointers(const mien_augment_job *job) {
    bool given = job->params && job->input;
    for (int side = 0; side < job->num_sides; ++side) given = given && job->faces[side];
    for (int i = 0; i < job->num_outputs; ++i) given = given && job->targets[i] && job->weights[i];
    for (int side = 0; job->to_landmarks && side < job->num_sides; ++side)
        given = given && job->landmarks[side] && job->nearest[side];
    if (!given) return fail(MIEN_INVALID_ARGUMENT, "null pointer");
    mien_status status = MIEN_OK;
    const auto check = [&status](const char *name, const void *pointer, size_t bytes) {
        if (status == MIEN_OK) status = check_aligned(name, pointer, bytes);
    };
    check("params", job->params, alignof(mien_face));
    check("input", job->input, job->input_channels == 8 ? 16 : bytes_of(job->input_type));
    check("mask", job->mask, alignof(float));
    for (int side = 0; side < job->num_sides; ++side) {
        check("faces", job->faces[side], 8);  // a pixel
        if (!job->to_landmarks) continue;
        check("landmarks", job->landmarks[side], alignof(float));
        check("nearest", job->nearest[side], alignof(int32_t));
    }
    for (int i = 0; i < job->num_outputs; ++i) {
        check("targets", job->targets[i], bytes_of(job->target_type));
        check("weights", job->weights[i], alignof(float));
    }
    return status;
}

Launches launches_of(const mien_augment_job &job) {
    Launches also{};
    for (int i = 0; i < job.num_outputs; ++i)
        also.outputs = also.outputs || job.output_px[i] != job.size_px;
    also.warp = job.size_px != job.input_px && job.size_px != 2 * job.input_px;
    also.landmarks = job.to_landmarks ? 2 : 0;
    return also;
}

mien_status check_draw(const mien_ranges *ranges, const mien_draw_job *job) {
    if (!ranges || !job || (!job->params && job->count > 0))
        return fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (const mien_status status = check_number("count", job->count, 0)) return status;
    if (const mien_status status = check_number("advance", job->advance, 0)) return status;
    if (job->num_sides < 1 || job->num_sides > MIEN_MAX_SIDES)
        return fail(MIEN_INVALID_ARGUMENT, "num_sides must be 1..%d, got %d", MIEN_MAX_SIDES,
                    job->num_sides);
    for (int side = 0; side < job->num_sides; ++side) {
        if (const mien_status status = check_number("num_faces", job->num_faces[side], 1))
            return status;
        if (job->first[side] < 0)
            return fail(MIEN_INVALID_ARGUMENT, "first must not be negative, got %lld",
                        static_cast<long long>(job->first[side]));
    }
    mien_status status = check_aligned("params", job->params, alignof(mien_face));
    if (status == MIEN_OK) status = check_aligned("counters", job->counters, alignof(int64_t));
    if (status != MIEN_OK) return status;
    if (job->size_px < kMinSizePx || job->size_px > kMaxSizePx)
        return fail(MIEN_INVALID_ARGUMENT, "size_px must be %d..%d, got %d", kMinSizePx, kMaxSizePx,
                    job->size_px);
    if (ranges->warp < MIEN_NO_WARP || ranges->warp > MIEN_WARP_LANDMARKS)
        return fail(MIEN_INVALID_ARGUMENT, "warp must be 0..%d, got %d", MIEN_WARP_LANDMARKS,
                    ranges->warp);
    if (ranges->clahe_max_size < 0 || ranges->clahe_max_size > kMaxClaheSize)
        return fail(MIEN_INVALID_ARGUMENT, "clahe_max_size must be 0..%d, got %d", kMaxClaheSize,
                    ranges->clahe_max_size);
    for (const float range : {ranges->zoom_percent, ranges->rotation_degrees, ranges->shift_percent,
                              ranges->flip_percent, ranges->lightness_percent, ranges->ab_percent,
                              ranges->clahe_chance_percent})
        if (!(range >= -kMaxRange && range <= kMaxRange))
            return fail(MIEN_INVALID_ARGUMENT, "ranges must be within %g, got %g", kMaxRange,
                        range);
    return MIEN_OK;
}

}  // namespace mien

mien_status mien_draw_cpu(const mien_ranges *ranges, const mien_draw_job *job) {
    if (const mien_status status = mien::check_draw(ranges, job)) return status;
    for (int side = 0; job->counters && side < job->num_sides; ++side)
        if (job->counters[side] < 0)
            return mien::fail(MIEN_INVALID_ARGUMENT, "counters must not be negative, got %lld",
                              static_cast<long long>(job->counters[side]));
    for (int64_t row = 0; row < job->num_sides * job->count; ++row)
        mien::draw_row(*ranges, *job, row, 0, 1);
    for (int side = 0; job->counters && side < job->num_sides; ++side)
        job->counters[side] = mien::serial_of(job->counters[side], job->advance, 0);
    return MIEN_OK;
}

int32_t mien_augment_launches(const mien_augment_job *job) {
    if (mien::check_job(job) != MIEN_OK || job->count == 0) return 0;
    const mien::Launches also = mien::launches_of(*job);
    return 5 + also.outputs + also.landmarks +
           also.warp;  // gather, tables, color, transform, input
}

mien_status mien_augment_cpu(const mien_augment_job *job, int32_t num_threads) {
    if (const mien_status status = mien::check_job(job)) return status;
    if (job->count == 0) return MIEN_OK;
    if (const mien_status status = mien::check_pointers(job)) return status;
    for (int64_t i = 0; i < job->count; ++i)
        if (const mien_status status = check_face(*job, i)) return status;
    static const mien::LevelTables levels = make_level_tables();
    static const mien::AugmentFace augment_face = best_build();
    const size_t bytes = mien::face_scratch_bytes(*job);
    const int num_threads_used = mien::resolve_threads(num_threads);
    const mien::FaceCall call{job, &kColors, &kLab, &levels};
    std::atomic<bool> short_of_memory{false};
    mien::for_each(job->count, num_threads_used, [&](int64_t face, int) {
        unsigned char *scratch = thread_scratch(bytes);
        if (scratch)
            augment_face(call, face, scratch);
        else
            short_of_memory = true;
    });
    return short_of_memory
               ? mien::fail(MIEN_OUT_OF_MEMORY, "no memory for %zu bytes of scratch", bytes)
               : MIEN_OK;
}

#ifndef MIEN_WITH_CUDA
namespace {
mien_status no_cuda() {
    return mien::fail(MIEN_NOT_BUILT, "libmien was built without CUDA; build it where nvcc is");
}
}  // namespace

mien_status mien_draw_cuda(const mien_ranges *, const mien_draw_job *, void *) { return no_cuda(); }
mien_status mien_augment_cuda(const mien_augment_job *, void *, int64_t, void *) {
    return no_cuda();
}
int64_t mien_augment_workspace_bytes(const mien_augment_job *) { return 0; }
#endif
