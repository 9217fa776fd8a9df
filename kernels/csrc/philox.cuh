// Random numbers that are a pure function of a key and a counter: Philox4x32-10 (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and what is made of them. The logarithm,
// sine and cosine are written out, so that the CPU and every GPU draw the same bits.
#pragma once

#include "host_device.cuh"

namespace mien {

struct Words {
    uint32_t word[4];
};

MIEN_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t low = uint64_t{0xD2511F53u} * c0, high = uint64_t{0xCD9E8D57u} * c2;
        c0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(high);
        c2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(low);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// 0 <= u < 1 in steps of 2^-24.
MIEN_HD float unit(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// -1 <= u < 1, exact.
MIEN_HD float symmetric(uint32_t word) { return 2.0f * unit(word) - 1.0f; }

// True in `percent` of all draws; never at 0, always at 100.
MIEN_HD bool happens(uint32_t word, float percent) {
    return static_cast<double>(word) < static_cast<double>(percent) * (4294967296.0 / 100.0);
}

// A whole number of 0 ... count - 1.
MIEN_HD uint32_t below(uint32_t word, uint32_t count) {
    return static_cast<uint32_t>((uint64_t{word} * count) >> 32);
}

// Natural logarithm of 2^-33 <= x <= 1: x = 2^e m, ln m = 2 artanh((m - 1) / (m + 1)).
MIEN_HD float log_unit(float x) {
    uint32_t bits = float_bits(x);
    int exponent = static_cast<int>(bits >> 23) - 127;
    float mantissa = bits_float((bits & 0x007FFFFFu) | 0x3F800000u);
    if (mantissa > 1.41421356f) {
        mantissa *= 0.5f;
        ++exponent;
    }
    const float s = (mantissa - 1.0f) / (mantissa + 1.0f), q = s * s;
    float series = fused(q, 1.0f / 9.0f, 1.0f / 7.0f);
    series = fused(q, series, 1.0f / 5.0f);
    series = fused(q, series, 1.0f / 3.0f);
    series = fused(q, series, 1.0f);
    return fused(static_cast<float>(exponent), 0.693147181f, 2.0f * s * series);
}

struct SineCosine {
    float sine, cosine;
};

// Of an angle in turns (1 = 360 degrees), -1 <= turns <= 1.
MIEN_HD SineCosine sine_cosine(float turns) {
    const int quarter = round_int(4.0f * turns);
    const float r = fused(static_cast<float>(quarter), -0.25f, turns) * 6.28318531f, q = r * r;
    float s = fused(q, 1.0f / 362880.0f, -1.0f / 5040.0f);
    s = fused(q, s, 1.0f / 120.0f);
    s = fused(q, s, -1.0f / 6.0f);
    s = fused(q * r, s, r);
    float c = fused(q, -1.0f / 3628800.0f, 1.0f / 40320.0f);
    c = fused(q, c, -1.0f / 720.0f);
    c = fused(q, c, 1.0f / 24.0f);
    c = fused(q, c, -0.5f);
    c = fused(q, c, 1.0f);
    switch (quarter & 3) {
        case 0:
            return {s, c};
        case 1:
            return {c, -s};
        case 2:
            return {-s, -c};
        default:
            return {-c, s};
    }
}

struct Pair {
    float first, second;
};

// Two independent standard normals of two words (Box and Muller 1958); none beyond 6.8 sigma.
MIEN_HD Pair normals(uint32_t radius_word, uint32_t angle_word) {
    const float uniform = fused(static_cast<float>(radius_word), 0x1p-32f, 0x1p-33f);
#if defined(__CUDA_ARCH__)
    const float radius = __fsqrt_rn(-2.0f * log_unit(uniform));
#else
    const float radius = __builtin_sqrtf(-2.0f * log_unit(uniform));
#endif
    const SineCosine angle = sine_cosine(unit(angle_word));
    return {radius * angle.cosine, radius * angle.sine};
}

// Where `offset` lands in a keyed permutation of 0 ... count - 1: an eight-round Feistel network
// on the next power of four, walked until the value is inside (Black and Rogaway 2002).
MIEN_HD int64_t permuted(int64_t offset, int64_t count, const Words &even, const Words &odd) {
    int half_bits = 0;
    while ((int64_t{1} << (2 * half_bits)) < count) ++half_bits;
    const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << half_bits) - 1);
    uint64_t value = static_cast<uint64_t>(offset);
    do {
        uint32_t left = static_cast<uint32_t>(value >> half_bits) & mask;
        uint32_t right = static_cast<uint32_t>(value) & mask;
        for (int round = 0; round < 8; ++round) {
            uint32_t mixed = right ^ (round & 1 ? odd : even).word[round >> 1];
            mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6Bu;
            mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35u;
            mixed ^= mixed >> 16;
            const uint32_t next = left ^ (mixed & mask);
            left = right;
            right = next;
        }
        value = (uint64_t{left} << half_bits) | right;
    } while (value >= static_cast<uint64_t>(count));
    return static_cast<int64_t>(value);
}

}  // namespace mien
