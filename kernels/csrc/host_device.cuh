// One body for the CPU threads and for the CUDA kernels. `static`: the CPU file is compiled once
// per instruction set, and the linker must never take one build's copy for another's.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MIEN_HD static __host__ __device__ __forceinline__
#else
#define MIEN_HD static inline __attribute__((always_inline))
#endif

// Before a loop that nvcc must unroll, so that what it indexes are registers; and before one that
// it must not, as the registers would not suffice.
#if defined(__CUDACC__)
#define MIEN_UNROLL _Pragma("unroll")
#define MIEN_ROLLED _Pragma("unroll 1")
#else
#define MIEN_UNROLL
#define MIEN_ROLLED
#endif

namespace mien {

MIEN_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

MIEN_HD int clamp_int(int value, int low, int high) {
    return value < low ? low : value > high ? high : value;
}

// Within low ... high, also what a file or a device tensor holds besides numbers: NaN becomes low.
template <class Number>
MIEN_HD Number clamp_number(Number value, Number low, Number high) {
    const Number above = value > low ? value : low;
    return above < high ? above : high;
}

MIEN_HD float floor_of(float value) {
#if defined(__CUDA_ARCH__)
    return floorf(value);
#else
    return __builtin_floorf(value);
#endif
}

// Round half to even, as the default rounding mode does. The value must be within those of int.
MIEN_HD int round_int(float value) {
#if defined(__CUDA_ARCH__)
    return __float2int_rn(value);
#else
    return static_cast<int>(__builtin_rintf(value));
#endif
}

MIEN_HD int round_int(double value) {
#if defined(__CUDA_ARCH__)
    return __double2int_rn(value);
#else
    return static_cast<int>(__builtin_rint(value));
#endif
}

MIEN_HD uint32_t float_bits(float value) {
    union {
        float number;
        uint32_t bits;
    } both;
    both.number = value;
    return both.bits;
}

MIEN_HD float bits_float(uint32_t bits) {
    union {
        uint32_t bits;
        float number;
    } both;
    both.bits = bits;
    return both.number;
}

}  // namespace mien
