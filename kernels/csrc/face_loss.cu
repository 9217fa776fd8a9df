// The picture losses on a GPU, in two launches.
//
//   forward   filtered pictures of a tile -> sums of the losses, derivatives of the SSIM map
//   gradient  filtered derivatives -> the gradient; one more block adds up the means
//
// and, without SSIM:
//
//   pixels    sums of the losses, and the gradient
//   means     the sums of all blocks

#include <cuda_runtime.h>

#include "face_loss.cuh"
#include "status.h"

namespace {

__device__ void add_up(const mien::LossCall &call, const mien::Tile &tile, int64_t num_blocks,
                       mien::LossSums &sums) {
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    mien::add_up_parts(call, thread, sums);
    __syncthreads();
    mien::add_up_block(call, num_blocks, tile.block, thread, sums);
}

// The second of the launch bounds are blocks that a multiprocessor is to have room for. Here and
// below: chosen by the registers that the compiler says, unmeasured on a GPU.
template <int kChannels, class RawPred, class RawTarget>
__global__ void __launch_bounds__(mien::kLossThreads, kChannels == 3 ? 5 : 4)
    loss_forward_kernel(const __grid_constant__ mien::LossCall call) {
    __shared__ mien::ForwardShared shared;
    const mien::Tile tile = mien::tile_at(call, blockIdx.x);
    const int thread = static_cast<int>(threadIdx.x);
    mien::picture_columns<float, kChannels, RawPred, RawTarget>(call, tile, thread, shared);
    __syncthreads();
    mien::picture_rows<float, kChannels>(call, tile, thread, shared);
    add_up(call, tile, gridDim.x, shared.sums);
}

__device__ void means(const mien::LossCall &call, mien::MeansShared &shared) {
    const int thread = static_cast<int>(threadIdx.x);
    mien::add_up_means(call, thread, shared);
    __syncthreads();
    mien::store_means(call, thread, shared);
}

// Block 0: the means. The others begin with what was written last and may still lie in the cache.
template <int kChannels>
__global__ void __launch_bounds__(mien::kLossThreads, 5)
    loss_gradient_kernel(const __grid_constant__ mien::LossCall call) {
    __shared__ union {
        mien::GradientShared gradient;
        mien::MeansShared means;
    } shared;
    if (blockIdx.x == 0) return means(call, shared.means);
    const mien::Tile tile = mien::tile_at(call, gridDim.x - 1 - blockIdx.x);
    const int thread = static_cast<int>(threadIdx.x);
    mien::slope_columns<float, kChannels>(call, tile, thread, shared.gradient);
    __syncthreads();
    mien::slope_rows<float, kChannels>(call, tile, thread, shared.gradient);
}

template <int kChannels>
__global__ void __launch_bounds__(mien::kLossThreads, 7)
    loss_pixels_kernel(const __grid_constant__ mien::LossCall call) {
    __shared__ mien::LossSums sums;
    const mien::Tile tile = mien::tile_at(call, blockIdx.x);
    mien::pixel_rows<float, kChannels>(call, tile, static_cast<int>(threadIdx.x), sums);
    add_up(call, tile, gridDim.x, sums);
}

__global__ void __launch_bounds__(mien::kLossThreads)
    loss_means_kernel(const __grid_constant__ mien::LossCall call) {
    __shared__ mien::MeansShared shared;
    means(call, shared);
}

template <int kChannels>
void launch(const mien::LossCall &call, unsigned blocks, cudaStream_t queue) {
    constexpr int kThreads = mien::kLossThreads;
    if (!call.asked[MIEN_SSIM]) {
        loss_pixels_kernel<kChannels><<<blocks, kThreads, 0, queue>>>(call);
        loss_means_kernel<<<1, kThreads, 0, queue>>>(call);
        return;
    }
    const bool wide_pred = call.pred_type == MIEN_FLOAT32;
    const bool wide_target = call.target_type == MIEN_FLOAT32;
    if (wide_pred && wide_target)
        loss_forward_kernel<kChannels, float, float><<<blocks, kThreads, 0, queue>>>(call);
    else if (wide_pred)
        loss_forward_kernel<kChannels, float, uint16_t><<<blocks, kThreads, 0, queue>>>(call);
    else if (wide_target)
        loss_forward_kernel<kChannels, uint16_t, float><<<blocks, kThreads, 0, queue>>>(call);
    else
        loss_forward_kernel<kChannels, uint16_t, uint16_t><<<blocks, kThreads, 0, queue>>>(call);
    loss_gradient_kernel<kChannels><<<blocks + 1, kThreads, 0, queue>>>(call);
}

}  // namespace

mien_status mien_face_loss_cuda(const mien_face_loss_job *job, void *workspace,
                                int64_t workspace_bytes, void *stream) {
    mien::LossCall call;
    const mien_status status = mien::prepare_face_loss(job, workspace, workspace_bytes, &call);
    if (status != MIEN_OK) return status;
    const int64_t blocks = 2 * call.batch * call.tiles_x * call.tiles_y;
    if (blocks >= INT32_MAX)
        return mien::fail(MIEN_INVALID_ARGUMENT, "faces must be at most %d tiles, got %lld",
                          INT32_MAX - 1, static_cast<long long>(blocks));
    const auto queue = static_cast<cudaStream_t>(stream);
    if (call.channels == 3)
        launch<3>(call, static_cast<unsigned>(blocks), queue);
    else
        launch<1>(call, static_cast<unsigned>(blocks), queue);
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return MIEN_OK;
    return mien::fail(MIEN_CUDA_ERROR, "face_loss: %s", cudaGetErrorString(error));
}
