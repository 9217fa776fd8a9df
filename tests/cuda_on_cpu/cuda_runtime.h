// What mien's kernels use of CUDA, for g++: in place of the toolkit's header of this name.
//
// A block's threads are fibers of one thread of the CPU (block.cpp). Each runs until a barrier or a
// shuffle; which one goes on is chosen forwards, backwards or at random. emulator.py rewrites what
// is no C++: `k<<<...>>>(...)` to emulated::launch, `__shared__ T x;` to emulated::shared.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void *;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emulated {

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

void sync_block();
void sync_warp();
uint32_t shuffle(uint32_t value, int source_lane, bool is_inside);
int lane();
void note_atomic(void *address, size_t bytes);

// Memory of the running block for one declaration, which `key` tells from others.
void *shared_memory(const void *key, const char *name, size_t bytes, size_t alignment);
void *dynamic_memory();

struct Grid {
    dim3 grid, block;
    size_t dynamic_bytes;
    cudaStream_t stream;
};

// Runs `body` as every thread of the grid. `arguments`, of so many bytes, may be read by all.
void run(const char *name, const Grid &grid, void (*body)(void *), void *arguments, size_t bytes);

template <class Declared>
Declared &shared(const char *name) {
    static char key;
    void *at = shared_memory(&key, name, sizeof(Declared), alignof(Declared));
    return *static_cast<Declared *>(at);
}

// As <<<>>>: the arguments are copied when the kernel is launched.
template <class... Parameters, class... Arguments>
void launch(const char *name, const Grid &grid, void (*kernel)(Parameters...),
            const Arguments &...arguments) {
    struct Copies {
        void (*kernel)(Parameters...);
        std::tuple<std::remove_cv_t<Parameters>...> arguments;
    } copies{kernel, {arguments...}};
    const auto body = [](void *from) {
        auto *own = static_cast<Copies *>(from);
        std::apply(own->kernel, own->arguments);
    };
    run(name, grid, body, &copies, sizeof copies);
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "another size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class Value>
Value shuffled(unsigned mask, Value value, int source, bool is_inside) {
    static_assert(sizeof(Value) == 4, "shuffles move 32 bits here");
    if (mask != 0xFFFFFFFFu) __builtin_trap();  // a part of a warp is not emulated
    return bits_as<Value>(shuffle(bits_as<uint32_t>(value), source, is_inside));
}

}  // namespace emulated

cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t error);

#define threadIdx emulated::thread_index()
#define blockIdx emulated::block_index()
#define blockDim emulated::block_size()
#define gridDim emulated::grid_size()

inline void __syncthreads() { emulated::sync_block(); }
inline void __syncwarp(unsigned = 0xFFFFFFFFu) { emulated::sync_warp(); }

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source) {
    return emulated::shuffled(mask, value, source & 31, true);
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned lanes) {
    const int source = emulated::lane() - static_cast<int>(lanes);
    return emulated::shuffled(mask, value, source, source >= 0);
}
template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned lanes) {
    const int source = emulated::lane() + static_cast<int>(lanes);
    return emulated::shuffled(mask, value, source, source < 32);
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
    return emulated::shuffled(mask, value, emulated::lane() ^ lanes, true);
}

template <class Value>
__attribute__((no_sanitize("thread"))) Value atomicAdd(Value *address, Value value) {
    emulated::note_atomic(address, sizeof value);
    const Value before = *address;
    *address = before + value;
    return before;
}

template <class Value>
Value __ldg(const Value *address) {
    return *address;
}

inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }

// Saturating, NaN to 0, as on a GPU.
inline int __double2int_rn(double value) {
    if (!(value == value)) return 0;
    return value >= INT32_MAX   ? INT32_MAX
           : value <= INT32_MIN ? INT32_MIN
                                : static_cast<int>(__builtin_rint(value));
}
inline int __float2int_rn(float value) { return __double2int_rn(static_cast<double>(value)); }
