// Rows of BGR -> LAB, shifted, with AVX2: the same levels as in color.cuh, bit for bit. The numbers
// whose cube roots are taken are sums over the three levels of a pixel, so a table holds what every
// level adds to all of them: three loads in the place of three lookups and nine products.
#pragma once

#include "color.cuh"

namespace mien {

// What lab_row looks up, from the tables of color.cuh.
struct LabTables {
    alignas(16) int32_t parts[3][256][4];  // B G R: what a level adds to X, Y and Z * 2^12
    uint16_t cube_root[2041];              // linear light * 2040 -> f * 2^15
};

constexpr LabTables make_lab_tables(const ColorTables &colors) {
    constexpr int kWeights[3][3] = {{778, 296, 3575}, {1541, 2929, 448}, {1777, 871, 73}};
    LabTables t{};
    for (int channel = 0; channel < 3; ++channel)
        for (int level = 0; level < 256; ++level)
            for (int axis = 0; axis < 3; ++axis)
                t.parts[channel][level][axis] =
                    kWeights[channel][axis] * colors.linear[level] + (channel == 0 ? 2048 : 0);
    for (int i = 0; i <= 2040; ++i) t.cube_root[i] = static_cast<uint16_t>(colors.cube_root[i]);
    return t;
}

}  // namespace mien

#ifdef __AVX2__

#include <immintrin.h>

namespace mien {

constexpr int kLabBlock = 64;  // pixels between two passes; chosen, not measured

// Cube roots of X, Y and Z of a block of pixels.
struct CubeRoots {
    alignas(16) uint16_t x[kLabBlock], y[kLabBlock], z[kLabBlock];
};

static inline __m128i parts_of(const LabTables &t, int channel, uint32_t level) {
    return _mm_load_si128(reinterpret_cast<const __m128i *>(t.parts[channel][level]));
}

static inline void cube_roots(const LabTables &t, const uint32_t *source, int count,
                              CubeRoots *roots) {
    for (int i = 0; i < count; ++i) {
        const uint32_t bgr = source[2 * i];
        const __m128i sums =
            _mm_add_epi32(_mm_add_epi32(parts_of(t, 0, bgr & 255), parts_of(t, 1, bgr >> 8 & 255)),
                          parts_of(t, 2, bgr >> 16 & 255));
        const __m128i light = _mm_srli_epi32(sums, 12);
        const auto x_and_y = static_cast<uint64_t>(_mm_cvtsi128_si64(light));
        roots->x[i] = t.cube_root[static_cast<uint32_t>(x_and_y)];
        roots->y[i] = t.cube_root[x_and_y >> 32];
        roots->z[i] = t.cube_root[static_cast<uint32_t>(_mm_extract_epi32(light, 2))];
    }
}

static inline __m256i eight_of(const uint16_t *numbers) {
    return _mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i *>(numbers)));
}

// (factor * number + add) >> 15 of eight numbers, shifted as `shifted` does, by a part of -1..1.
static inline void store_shifted(__m256i numbers, int factor, int add, float part, uint8_t *out) {
    const __m256i scaled = _mm256_mullo_epi32(numbers, _mm256_set1_epi32(factor));
    const __m256 level =
        _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_add_epi32(scaled, _mm256_set1_epi32(add)), 15));
    const __m256 rest = _mm256_sub_ps(_mm256_set1_ps(255.0f), level);
    const __m256 moved = part >= 0 ? _mm256_add_ps(level, _mm256_mul_ps(rest, _mm256_set1_ps(part)))
                                   : _mm256_mul_ps(level, _mm256_set1_ps(1.0f + part));
    const __m256i words = _mm256_cvttps_epi32(moved);
    const __m128i halves =
        _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_packus_epi16(halves, halves));
}

// A row of lab_of and of shifted by `change`, out of a store; how many pixels it has done, a
// multiple of eight.
static inline int lab_row(const LabTables &t, const uint32_t *__restrict source, int count,
                          const float change[3], uint8_t *__restrict light, uint8_t *__restrict a,
                          uint8_t *__restrict b) {
    const float part_l = clamp_number(change[0], -1.0f, 1.0f);
    const float part_a = clamp_number(change[1], -1.0f, 1.0f);
    const float part_b = clamp_number(change[2], -1.0f, 1.0f);
    const int done = count / 8 * 8;
    CubeRoots roots;
    for (int at = 0; at < done; at += kLabBlock) {
        const int block = done - at < kLabBlock ? done - at : kLabBlock;
        cube_roots(t, source + 2 * at, block, &roots);
        for (int i = 0; i < block; i += 8) {
            const __m256i x = eight_of(roots.x + i), y = eight_of(roots.y + i),
                          z = eight_of(roots.z + i);
            store_shifted(y, kLightScale, kLightShift + kHalf, part_l, light + at + i);
            store_shifted(_mm256_sub_epi32(x, y), 500, kMiddle, part_a, a + at + i);
            store_shifted(_mm256_sub_epi32(y, z), 200, kMiddle, part_b, b + at + i);
        }
    }
    return done;
}

}  // namespace mien

#endif
