// The C ABI of the picture losses on the CPU: checks, workspace, threads, and the choice of the
// build of face_loss_face.cpp that this processor can run.
#include "face_loss.cuh"
#include "processor.h"
#include "status.h"
#include "threads.h"

namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kMaxNumbers = int64_t{1} << 48;  // of a side's pictures: no size overflows

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The best build for this processor.
mien::FaceLossFace best_build() {
#if defined(__x86_64__)
    if (mien::may_use_avx2()) return mien::face_loss_face_avx2;
#endif
    return mien::face_loss_face_baseline;
}

mien_status check_job(const mien_face_loss_job *job) {
    using mien::fail;
    if (!job) return fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (job->channels != 1 && job->channels != 3)
        return fail(MIEN_INVALID_ARGUMENT, "channels must be 1 or 3, got %d", job->channels);
    if (job->batch < 1 || job->height < 1 || job->width < 1 || job->height > 65536 ||
        job->width > 65536)
        return fail(MIEN_INVALID_ARGUMENT,
                    "batch must be at least 1, height and width 1..65536, got %lld, %d, %d",
                    static_cast<long long>(job->batch), job->height, job->width);
    const int64_t most = kMaxNumbers / (int64_t{job->height} * job->width * job->channels);
    if (job->batch > most)
        return fail(MIEN_INVALID_ARGUMENT, "batch must be at most %lld of this size, got %lld",
                    static_cast<long long>(most), static_cast<long long>(job->batch));
    for (const int32_t type : {job->pred_type, job->target_type})
        if (type < MIEN_FLOAT32 || type > MIEN_FLOAT16)
            return fail(MIEN_INVALID_ARGUMENT, "unknown type %d", type);
    if (job->num_losses < 1 || job->num_losses > MIEN_MAX_LOSSES)
        return fail(MIEN_INVALID_ARGUMENT, "num_losses must be 1..%d, got %d", MIEN_MAX_LOSSES,
                    job->num_losses);
    for (int i = 0; i < job->num_losses; ++i) {
        const int kind = job->kinds[i];
        if (kind < 0 || kind >= mien::kKinds)
            return fail(MIEN_INVALID_ARGUMENT, "unknown loss %d", kind);
        if (kind == MIEN_SSIM && (job->height <= mien::kHalf || job->width <= mien::kHalf))
            return fail(MIEN_INVALID_ARGUMENT, "SSIM needs pictures of at least %d px, got %d x %d",
                        mien::kHalf + 1, job->width, job->height);
    }
    return MIEN_OK;
}

mien_status check_alignment(const mien_face_loss_job &job) {
    mien_status status = MIEN_OK;
    const auto check = [&status](const char *name, const void *pointer, size_t bytes) {
        if (status == MIEN_OK) status = mien::check_aligned(name, pointer, bytes);
    };
    for (int side = 0; side < 2; ++side) {
        check("preds", job.preds[side], mien::bytes_of(job.pred_type));
        check("gradients", job.gradients[side], mien::bytes_of(job.pred_type));
    }
    check("target", job.target, mien::bytes_of(job.target_type));
    check("weight", job.weight, alignof(float));
    check("scale", job.scale, alignof(float));
    check("means", job.means, alignof(float));
    return status;
}

// Whether every run of 12 numbers, or the weights of its pixels, is whole aligned words of four.
bool runs_are_wide(const mien_face_loss_job &job) {
    const auto aligned = [](const void *pointer, int32_t type) {
        return mien::starts_at(pointer, type == MIEN_FLOAT32 ? 16 : 8);
    };
    bool wide = job.width % 4 == 0 && aligned(job.target, job.target_type) &&
                aligned(job.weight, MIEN_FLOAT32);
    for (int side = 0; side < 2; ++side)
        wide = wide && aligned(job.preds[side], job.pred_type) &&
               aligned(job.gradients[side], job.pred_type);
    return wide;
}

// Where things lie in the workspace.
struct Layout {
    int64_t partials_bytes, bytes;
};

void lay_out(const mien_face_loss_job &job, mien::LossCall *call, Layout *layout) {
    call->length = job.width * job.channels;
    call->stride = rounded_up(call->length, 4);
    call->tiles_x =
        static_cast<int>(rounded_up(call->length, mien::kTileLength) / mien::kTileLength);
    call->tiles_y = static_cast<int>(rounded_up(job.height, mien::kTileRows) / mien::kTileRows);
    for (int i = 0; i < job.num_losses; ++i) call->asked[job.kinds[i]] = true;
    const int64_t blocks = 2 * job.batch * call->tiles_x * call->tiles_y;
    layout->partials_bytes = rounded_up(mien::kKinds * blocks * int64_t{sizeof(float)}, kAlignment);
    layout->bytes = layout->partials_bytes;
    if (call->asked[MIEN_SSIM])
        layout->bytes +=
            mien::kSlopeMaps * 2 * job.batch * job.height * call->stride * int64_t{sizeof(float)};
}

}  // namespace

namespace mien {

mien_status prepare_face_loss(const mien_face_loss_job *job, void *workspace,
                              int64_t workspace_bytes, LossCall *call) {
    if (const mien_status status = check_job(job)) return status;
    bool given = job->target && job->means;
    for (int side = 0; side < 2; ++side) given = given && job->preds[side] && job->gradients[side];
    if (!given) return fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (const mien_status status = check_alignment(*job)) return status;
    *call = LossCall{};
    Layout layout{};
    lay_out(*job, call, &layout);
    if (const mien_status status = check_workspace(workspace, workspace_bytes, layout.bytes))
        return status;
    for (int side = 0; side < 2; ++side) {
        call->preds[side] = job->preds[side];
        call->gradients[side] = job->gradients[side];
    }
    call->target = job->target;
    call->weight = job->weight;
    call->scale = job->scale;
    call->means = job->means;
    call->partials = static_cast<float *>(workspace);
    call->slopes =
        reinterpret_cast<float *>(static_cast<char *>(workspace) + layout.partials_bytes);
    call->batch = job->batch;
    call->height = job->height;
    call->width = job->width;
    call->channels = job->channels;
    call->pred_type = job->pred_type;
    call->target_type = job->target_type;
    call->wide = runs_are_wide(*job);
    call->inverse_count =
        static_cast<float>(1.0 / (static_cast<double>(job->batch) * job->height * call->length));
    call->num_losses = job->num_losses;
    for (int i = 0; i < job->num_losses; ++i) {
        call->kinds[i] = job->kinds[i];
        call->shares[job->kinds[i]] += job->shares[i];
    }
    return MIEN_OK;
}

}  // namespace mien

int64_t mien_face_loss_workspace_bytes(const mien_face_loss_job *job) {
    if (check_job(job) != MIEN_OK) return 0;
    mien::LossCall call{};
    Layout layout{};
    lay_out(*job, &call, &layout);
    return layout.bytes;
}

mien_status mien_face_loss_cpu(const mien_face_loss_job *job, void *workspace,
                               int64_t workspace_bytes, int32_t num_threads) {
    mien::LossCall call;
    const mien_status status = mien::prepare_face_loss(job, workspace, workspace_bytes, &call);
    if (status != MIEN_OK) return status;
    const mien::FaceLossFace face_loss_face = best_build();
    mien::for_each(2 * call.batch, mien::resolve_threads(num_threads),
                   [&](int64_t face, int) { face_loss_face(call, face); });
    mien::MeansShared shared;
    for (int t = 0; t < mien::kLossThreads; ++t) mien::add_up_means(call, t, shared);
    for (int t = 0; t < mien::kLossThreads; ++t) mien::store_means(call, t, shared);
    return MIEN_OK;
}

#ifndef MIEN_WITH_CUDA
mien_status mien_face_loss_cuda(const mien_face_loss_job *, void *, int64_t, void *) {
    return mien::fail(MIEN_NOT_BUILT, "libmien was built without CUDA; build it where nvcc is");
}
#endif
