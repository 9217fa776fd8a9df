// The losses by filters on a GPU, in one launch: each block is a team.
#include <cuda_runtime.h>

#include "filtered_loss_run.cuh"
#include "status.h"

namespace {

template <int kKind>
__global__ void __launch_bounds__(mien::kTeamThreads)
    filtered_loss_kernel(const __grid_constant__ mien::FilteredCall call) {
    const mien::Team team{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
    float *room = call.rooms + blockIdx.x * call.numbers;
    for (int64_t plane = blockIdx.x; plane < call.num_planes; plane += gridDim.x)
        mien::run_planes<kKind>(call, team, plane, room);
}

}  // namespace

mien_status mien_filtered_loss_cuda(const mien_filtered_loss_job *job, void *workspace,
                                    int64_t workspace_bytes, void *stream) {
    mien::FilteredCall call{};
    const mien_status status = mien::prepare_filtered_loss(job, workspace, workspace_bytes, &call);
    if (status != MIEN_OK) return status;
    const auto queue = static_cast<cudaStream_t>(stream);
    const unsigned blocks =
        static_cast<unsigned>(call.num_planes < job->num_teams ? call.num_planes : job->num_teams);
    constexpr int kThreads = mien::kTeamThreads;
    switch (call.kind) {
        case MIEN_PIXEL_GRADIENT_DIFF:
            filtered_loss_kernel<MIEN_PIXEL_GRADIENT_DIFF><<<blocks, kThreads, 0, queue>>>(call);
            break;
        case MIEN_GMSD:
            filtered_loss_kernel<MIEN_GMSD><<<blocks, kThreads, 0, queue>>>(call);
            break;
        case MIEN_LAPLOSS:
            filtered_loss_kernel<MIEN_LAPLOSS><<<blocks, kThreads, 0, queue>>>(call);
            break;
        default:
            filtered_loss_kernel<MIEN_MS_SSIM><<<blocks, kThreads, 0, queue>>>(call);
    }
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return MIEN_OK;
    return mien::fail(MIEN_CUDA_ERROR, "filtered_loss: %s", cudaGetErrorString(error));
}
