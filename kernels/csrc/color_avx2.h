// Rows of BGR -> LAB, shifted, and of LAB -> BGR with AVX2: the same levels as in color.cuh, bit
// for bit. On the way there the numbers whose cube roots are taken are sums over the three levels
// of a pixel, so a table holds what every level adds to all of them: three loads in the place of
// three lookups and nine products. On the way back there is no table: lookups would be the most of
// it.
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

// Linear light * 4096 -> 255 times what it is encoded as, by a polynomial of the fourth degree in
// that number and 32 more, which has eight powers of two below it. Fitted by a linear program to
// stay as far as can be from where the next byte begins.
constexpr int kGammaAdd = 32;
constexpr float kGamma[5][8] = {
    // By the lowest three bits of the exponent as a float has it: 2^9 to 2^12, then 2^5 to 2^8.
    {-8.99085667e-12f, -1.71373983e-12f, -1.39383568e-13f, 0.0f, 1.55396483e-05f, 1.0496985e-07f,
     4.47793891e-09f, -3.57208624e-10f},
    {4.79389719e-08f, 1.41980241e-08f, 2.28716801e-09f, 0.0f, -0.00304332539f, -2.00317463e-05f,
     -2.08594224e-06f, 6.81060499e-07f},
    {-0.000108655535f, -5.06601391e-05f, -1.62936212e-05f, 0.0f, 0.213455394f, -0.00151471491f,
     -0.000149911823f, -0.000560714689f},
    {0.172922716f, 0.129046977f, 0.0840739831f, 0.055555556f, -5.62992525f, 0.780049086f,
     0.342700541f, 0.324852973f},
    {30.2491245f, 42.5804138f, 65.1651077f, 26.1944447f, 45.0856819f, -18.5889015f, 4.0515337f,
     9.87180614f},
};

// L -> f(Y) * 2^14 and Y * 2^14, on the straight piece near black and above it.
constexpr int kLightStraightUpTo = 20;
constexpr float kRootAdd = 16384.0f * 16 / 116;
constexpr float kRootStep = 16384.0f * 100 / 255 / 116;
constexpr float kStraightRootStep = 16384.0 * 7.787 * 100 / 255 / 903.3;
constexpr float kCubedAdd = 16.0 / 116 * 25.398416831491196;  // the cube root of 2^14
constexpr float kCubedStep = 100.0 / 255 / 116 * 25.398416831491196;
constexpr float kStraightStep = 16384.0 * 100 / 255 / 903.3;

// What computing in float may add to an encoded level, to f(Y) * 2^14 and to Y * 2^14: at most
// 3e-5, 7e-4 and 2.3e-3.
constexpr double kLevelError = 2e-4, kRootError = 1e-3, kLightError = 3e-3;

constexpr bool rounds_to(double value, int expected, double error) {
    const double distance = value - expected;
    return distance < 0.5 - error && distance > error - 0.5;
}

constexpr bool encodes(const ColorTables &colors) {
    for (int i = 0; i < 4096; ++i) {
        const int number = i + kGammaAdd;
        int exponent = 0;
        while (number >> (exponent + 1)) ++exponent;
        double value = 0;
        for (const auto &of_degree : kGamma)
            value = value * number + of_degree[(exponent + 127) % 8];
        if (!rounds_to(value, colors.gamma_encode[i], kLevelError)) return false;
    }
    return true;
}

constexpr bool gives_light(const ColorTables &colors) {
    for (int i = 0; i < 256; ++i) {
        const bool is_straight = i <= kLightStraightUpTo;
        const double root = static_cast<double>(is_straight ? kStraightRootStep : kRootStep) * i;
        const double cubed = static_cast<double>(kCubedStep) * i + kCubedAdd;
        const double y =
            is_straight ? static_cast<double>(kStraightStep) * i : cubed * cubed * cubed;
        if (!rounds_to(root + kRootAdd, colors.light[i] >> 16, kRootError)) return false;
        if (!rounds_to(y, colors.light[i] & 0xFFFF, kLightError)) return false;
    }
    return true;
}

static_assert(encodes(make_color_tables()), "kGamma must give the bytes of gamma_encode");
static_assert(gives_light(make_color_tables()), "the numbers of L must be those of light");

}  // namespace mien

#ifdef __AVX2__

#include <immintrin.h>

namespace mien {

constexpr int kLabBlock = 64;  // pixels between two passes; chosen, not measured

// Cube roots of X, Y and Z of a block of pixels.
struct CubeRoots {
    alignas(16) uint16_t x[kLabBlock], y[kLabBlock], z[kLabBlock];
};

// `bytes`: where the level's entry lies, 16 times the level.
static inline __m128i parts_of(const LabTables &t, int channel, uint32_t bytes) {
    const auto *parts = reinterpret_cast<const char *>(t.parts[channel]);
    return _mm_load_si128(reinterpret_cast<const __m128i *>(parts + bytes));
}

static inline void cube_roots(const LabTables &t, const uint32_t *source, int count,
                              CubeRoots *roots) {
    for (int i = 0; i < count; ++i) {
        const uint32_t bgr = source[2 * i];
        const __m128i sums = _mm_add_epi32(
            _mm_add_epi32(parts_of(t, 0, bgr << 4 & 0xFF0), parts_of(t, 1, bgr >> 4 & 0xFF0)),
            parts_of(t, 2, bgr >> 12 & 0xFF0));
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

// ---- LAB -> BGR -------------------------------------------------------------------------------

static inline __m256i eight_levels(const uint8_t *levels) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(levels)));
}

static inline __m256i times(__m256i number, int factor) {
    return _mm256_mullo_epi32(number, _mm256_set1_epi32(factor));
}

static inline __m256i plus(__m256i number, int more) {
    return _mm256_add_epi32(number, _mm256_set1_epi32(more));
}

static inline __m256 fused_by(__m256 number, float factor, float more) {
    return _mm256_fmadd_ps(number, _mm256_set1_ps(factor), _mm256_set1_ps(more));
}

// cube_of of eight numbers.
static inline __m256i cubes_of(__m256i f) {
    const __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(f), _mm256_set1_ps(0.12841856f));
    const __m256i straight = plus(_mm256_cvttps_epi32(part), -290);
    const __m256i square = _mm256_srai_epi32(_mm256_mullo_epi32(f, f), 14);
    const __m256i cube = _mm256_srai_epi32(_mm256_mullo_epi32(square, f), 14);
    const __m256i is_cube = _mm256_cmpgt_epi32(f, _mm256_set1_epi32(kStraightUpTo));
    return _mm256_blendv_epi8(straight, cube, is_cube);
}

// Eight sums with 14 fractional bits as linear light of 0..4095, encoded.
static inline __m256i encoded(__m256i sums) {
    const __m256i light = _mm256_srai_epi32(plus(sums, 8192 + (kGammaAdd << 14)), 14);
    const __m256 number =
        _mm256_cvtepi32_ps(_mm256_min_epi32(_mm256_max_epi32(light, _mm256_set1_epi32(kGammaAdd)),
                                            _mm256_set1_epi32(kGammaAdd + 4095)));
    const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(number), 23);
    __m256 level = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kGamma[0]), exponent);
    for (int i = 1; i < 5; ++i)
        level = _mm256_fmadd_ps(level, number,
                                _mm256_permutevar8x32_ps(_mm256_loadu_ps(kGamma[i]), exponent));
    return _mm256_cvtps_epi32(level);
}

// A row of bgr_of, with the highest byte of each pixel of the store it came from; how many pixels
// it has done, a multiple of eight.
static inline int bgr_row(const uint32_t *__restrict source, int count,
                          const uint8_t *__restrict light, const uint8_t *__restrict a,
                          const uint8_t *__restrict b, uint32_t *__restrict out) {
    int at = 0;
    for (; at + 8 <= count; at += 8) {
        const __m256 l = _mm256_cvtepi32_ps(eight_levels(light + at));
        const __m256 is_straight =
            _mm256_cmp_ps(l, _mm256_set1_ps(static_cast<float>(kLightStraightUpTo)), _CMP_LE_OQ);
        const __m256 cubed = fused_by(l, kCubedStep, kCubedAdd);
        const __m256i f = _mm256_cvtps_epi32(
            _mm256_blendv_ps(fused_by(l, kRootStep, kRootAdd),
                             fused_by(l, kStraightRootStep, kRootAdd), is_straight));
        const __m256i y = _mm256_cvtps_epi32(
            _mm256_blendv_ps(_mm256_mul_ps(_mm256_mul_ps(cubed, cubed), cubed),
                             _mm256_mul_ps(l, _mm256_set1_ps(kStraightStep)), is_straight));
        const __m256i from_a =
            _mm256_srai_epi32(plus(times(eight_levels(a + at), 5 * 53687), 128), 13);
        const __m256i from_b = _mm256_srai_epi32(plus(times(eight_levels(b + at), 41943), 16), 9);
        const __m256i x = cubes_of(plus(_mm256_add_epi32(f, from_a), -4194));
        const __m256i z = cubes_of(plus(_mm256_sub_epi32(f, from_b), 10484));
        const auto sum = [x, y, z](int by_x, int by_y, int by_z) {
            return _mm256_add_epi32(_mm256_add_epi32(times(x, by_x), times(y, by_y)),
                                    times(z, by_z));
        };
        const __m256i blue = encoded(sum(217, -836, 4715));
        const __m256i green = encoded(sum(-3773, 7684, 185));
        const __m256i red = encoded(sum(12615, -6296, -2223));
        const auto *words = reinterpret_cast<const __m256i *>(source + 2 * at);
        // The first word of each pixel; in the order 0 1 4 5 2 3 6 7 until it is put right.
        const __m256i first =
            _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(
                                         _mm256_castsi256_ps(_mm256_loadu_si256(words)),
                                         _mm256_castsi256_ps(_mm256_loadu_si256(words + 1)), 0x88)),
                                     0xD8);
        const __m256i highest =
            _mm256_and_si256(first, _mm256_set1_epi32(static_cast<int>(0xFF000000u)));
        const __m256i lower = _mm256_or_si256(_mm256_or_si256(blue, _mm256_slli_epi32(green, 8)),
                                              _mm256_slli_epi32(red, 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + at), _mm256_or_si256(highest, lower));
    }
    return at;
}

}  // namespace mien

#endif
