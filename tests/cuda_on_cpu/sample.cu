// Kernels for what an emulated block can do besides what mien's own kernels ask of it.
#include <cuda_runtime.h>

namespace {

// Each block turns its part round.
__global__ void turn_kernel(const int *from, int *to) {
    extern __shared__ int part[];
    const unsigned first = blockIdx.x * blockDim.x;
    part[threadIdx.x] = from[first + threadIdx.x];
    __syncthreads();
    to[first + threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}

// A row for each kind of shuffle.
__global__ void shuffle_kernel(int *to) {
    const int own = static_cast<int>(threadIdx.x), num = static_cast<int>(blockDim.x);
    to[own] = __shfl_sync(0xFFFFFFFFu, own, 3);
    to[num + own] = __shfl_up_sync(0xFFFFFFFFu, own, 2);
    to[2 * num + own] = __shfl_down_sync(0xFFFFFFFFu, own, 2);
    to[3 * num + own] = __shfl_xor_sync(0xFFFFFFFFu, own, 5);
}

// Neighbours exchange numbers: within the warp, or `distance` threads apart.
__global__ void neighbour_kernel(int distance, int *to) {
    __shared__ int numbers[64];
    numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncwarp();
    to[threadIdx.x] = numbers[threadIdx.x ^ static_cast<unsigned>(distance)];
}

__global__ void count_kernel(int *count) { atomicAdd(count, 1); }

}  // namespace

extern "C" {

void sample_turn(const int *from, int *to, int blocks, int threads, int bytes) {
    turn_kernel<<<blocks, threads, bytes, nullptr>>>(from, to);
}
void sample_shuffle(int *to) { shuffle_kernel<<<1, 64, 0, nullptr>>>(to); }
void sample_neighbour(int distance, int *to) {
    neighbour_kernel<<<1, 64, 0, nullptr>>>(distance, to);
}
void sample_count(int *count) { count_kernel<<<dim3(3, 2, 2), dim3(4, 3, 2), 0, nullptr>>>(count); }
const char *sample_error(void) { return cudaGetErrorString(cudaGetLastError()); }
}
