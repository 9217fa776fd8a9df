// What a thread works on at once: `Lanes` is a float on a GPU and in the baseline build for the
// CPU, a vector of eight where the CPU has AVX2. One body serves both: operators, comparisons and
// ?: act on every lane.
#pragma once

#include <string.h>

#include "host_device.cuh"

namespace mien {

// ---- eight floats -----------------------------------------------------------------------------

#if defined(__AVX2__) && defined(__FMA__)
typedef float EightFloats __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));

MIEN_HD EightFloats fused(EightFloats a, EightFloats b, EightFloats c) {
    return __builtin_ia32_vfmaddps256(a, b, c);
}
MIEN_HD EightFloats fused(EightFloats a, float b, EightFloats c) {
    return fused(a, EightFloats{b, b, b, b, b, b, b, b}, c);
}
MIEN_HD EightWords lane_bits(EightFloats values) { return (EightWords)values; }
MIEN_HD EightFloats lanes_of_bits(EightWords bits) { return (EightFloats)bits; }
MIEN_HD EightFloats lanes_of_ints(EightWords ints) {
    return __builtin_convertvector((EightInts)ints, EightFloats);
}
#endif

MIEN_HD uint32_t lane_bits(float value) { return float_bits(value); }
MIEN_HD float lanes_of_bits(uint32_t bits) { return bits_float(bits); }
MIEN_HD float lanes_of_ints(uint32_t integer) {
    return static_cast<float>(static_cast<int32_t>(integer));
}

// ---- any lanes --------------------------------------------------------------------------------

template <class Lanes>
constexpr int kWidth = static_cast<int>(sizeof(Lanes) / sizeof(float));

template <class Lanes>
MIEN_HD Lanes load_lanes(const float *from) {
    if constexpr (kWidth<Lanes> == 1) {
        return *from;
    } else {
        Lanes lanes;
        memcpy(&lanes, from, sizeof lanes);
        return lanes;
    }
}

template <class Lanes>
MIEN_HD void store_lanes(float *to, Lanes lanes) {
    if constexpr (kWidth<Lanes> == 1)
        *to = lanes;
    else
        memcpy(to, &lanes, sizeof lanes);
}

template <class Lanes>
MIEN_HD Lanes same_in_all(float value) {
    return Lanes{} + value;
}

template <class Lanes>
MIEN_HD Lanes larger_of(Lanes a, Lanes b) {
    return a > b ? a : b;
}

template <class Lanes>
MIEN_HD Lanes absolute(Lanes value) {
    return value < 0.0f ? -value : value;
}

// A polynomial of x, coefficients from the highest power down: sum x + next, and so on.
template <class Lanes, class... More>
MIEN_HD Lanes polynomial(Lanes x, Lanes sum, float next, More... more) {
    sum = fused(sum, x, same_in_all<Lanes>(next));
    if constexpr (sizeof...(more) == 0)
        return sum;
    else
        return polynomial(x, sum, more...);
}

// Natural logarithm of a normal number above 0, to about a unit in the last place (Cephes, logf).
template <class Lanes>
MIEN_HD Lanes log_of(Lanes value) {
    constexpr uint32_t kHalfRoot = 0x3F3504F3u, kFraction = 0x007FFFFFu;  // sqrt(1/2)
    const auto above = lane_bits(value) - kHalfRoot;
    const Lanes exponent = lanes_of_ints(above & ~kFraction) * 0x1p-23f;
    const Lanes t = lanes_of_bits((above & kFraction) + kHalfRoot) - 1.0f;
    const Lanes cubic =
        polynomial(t, same_in_all<Lanes>(7.0376836292e-2f), -1.1514610310e-1f, 1.1676998740e-1f,
                   -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
                   -2.4999993993e-1f, 3.3333331174e-1f);
    const Lanes square = t * t, rest = fused(exponent, -2.12194440e-4f, cubic * t * square);
    return fused(exponent, 0.693359375f, t + fused(square, -0.5f, rest));
}

// e^value of -87..88 (Cephes, expf).
template <class Lanes>
MIEN_HD Lanes exp_of(Lanes value) {
    constexpr float kWhole = 12582912.0f;  // adding it rounds to an integer, in the last bits
    const Lanes moved = fused(value, 1.44269504088896341f, same_in_all<Lanes>(kWhole));
    const Lanes whole = moved - kWhole;
    const Lanes x = fused(whole, 2.12194440e-4f, fused(whole, -0.693359375f, value));
    const Lanes square =
        polynomial(x, same_in_all<Lanes>(1.9875691500e-4f), 1.3981999507e-3f, 8.3334519073e-3f,
                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f);
    const Lanes sum = fused(square * x, x, x + 1.0f);
    return lanes_of_bits(lane_bits(sum) + (lane_bits(moved) << 23));
}

}  // namespace mien
