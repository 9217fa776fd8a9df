// A pixel of three bytes as a vector of four numbers, of which the last means nothing. Included by
// files that are compiled once per instruction set, so nothing here has external linkage.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

namespace {

typedef int32_t Pixel __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(4)));

constexpr int kBytes = 3;  // of a pixel

// Both in two instructions for AVX2, where the compiler takes ten.
#ifdef __AVX2__
Pixel widened(Bytes packed) {
    int32_t bits;
    memcpy(&bits, &packed, sizeof(bits));
    return reinterpret_cast<Pixel>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bits)));
}

template <int kFirst, int kSecond, int kThird>
Bytes narrowed(Pixel pixel) {
    const __m128i order = _mm_set1_epi32(4 * kFirst | kSecond << 10 | kThird << 18 | 12 << 24);
    const int32_t bits =
        _mm_cvtsi128_si32(_mm_shuffle_epi8(reinterpret_cast<__m128i>(pixel), order));
    Bytes packed;
    memcpy(&packed, &bits, sizeof(packed));
    return packed;
}
#else
Pixel widened(Bytes packed) { return __builtin_convertvector(packed, Pixel); }

template <int kFirst, int kSecond, int kThird>
Bytes narrowed(Pixel pixel) {
    return __builtin_convertvector(
        __builtin_shufflevector(pixel, pixel, kFirst, kSecond, kThird, 3), Bytes);
}
#endif

// The pixel at `from`; of four bytes that are read, the last is the next pixel's.
template <int kRead>
Pixel load(const uint8_t *from) {
    Bytes packed{};
    memcpy(&packed, from, kRead);
    return widened(packed);
}

// The lowest bytes of three numbers in that order; of four that are written, the last is any.
template <int kWritten, int kFirst, int kSecond, int kThird>
void store(uint8_t *to, Pixel pixel) {
    const Bytes packed = narrowed<kFirst, kSecond, kThird>(pixel);
    memcpy(to, &packed, kWritten);
}

}  // namespace
