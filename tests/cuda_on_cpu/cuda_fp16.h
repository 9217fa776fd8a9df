// Half precision as mien's kernels use it: see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

using __half = _Float16;

inline __half __ushort_as_half(uint16_t bits) { return emulated::bits_as<__half>(bits); }
inline uint16_t __half_as_ushort(__half value) { return emulated::bits_as<uint16_t>(value); }
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
