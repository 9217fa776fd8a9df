// Rows of the affine, of the random warp and of stored pictures with AVX2, the same bits as in
// augment.cuh. Where pixels are gathered, two side by side are read as one word of 64 bits, so half
// as many are. All return how many pixels they have done, a multiple of eight.
#pragma once

#ifdef __AVX2__

#include <immintrin.h>

#include <cstring>

#include "augment.cuh"

namespace mien {

// The words at eight places and those to the right of them: of places 0 1 4 5 and 2 3 6 7, from
// which packing makes eight in a row.
struct PixelPairs {
    __m256i first, second;
};

// Two places in the halves of each number -> the words there and those to the right of them.
static inline __m256i pairs_at(const uint32_t *picture, int64_t first, int64_t second) {
    // Copied, since an address of two words is none that a double may lie at; it is one load.
    const auto pair = [picture](int64_t place) {
        int64_t both;
        std::memcpy(&both, picture + static_cast<int32_t>(place), sizeof(both));
        return both;
    };
    return _mm256_set_epi64x(pair(second >> 32), pair(second), pair(first >> 32), pair(first));
}

// By loads: on Zen 4 the instruction that gathers takes 1.04 times as long for a whole face.
static inline PixelPairs gather_pairs(const uint32_t *picture, __m256i at) {
    const __m128i low = _mm256_castsi256_si128(at), high = _mm256_extracti128_si256(at, 1);
    return {pairs_at(picture, _mm_cvtsi128_si64(low), _mm_cvtsi128_si64(high)),
            pairs_at(picture, _mm_extract_epi64(low, 1), _mm_extract_epi64(high, 1))};
}

static inline __m256i clamped(__m256i value, int last) {
    return _mm256_min_epi32(_mm256_max_epi32(value, _mm256_setzero_si256()),
                            _mm256_set1_epi32(last));
}

// ---- affine -----------------------------------------------------------------------------------

// Four pixels as 16-bit levels. `right`: a byte of the left weight and one of the right, four times
// a pixel; `down`: the upper and the lower weight, for the pixels 0 and 2, and 1 and 3.
static inline __m256i blend_four(__m256i top, __m256i bottom, __m256i right, __m256i even_down,
                                 __m256i odd_down) {
    const __m256i side_by_side =
        _mm256_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,  //
                         0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m256i half = _mm256_set1_epi32(512);
    top = _mm256_maddubs_epi16(_mm256_shuffle_epi8(top, side_by_side), right);
    bottom = _mm256_maddubs_epi16(_mm256_shuffle_epi8(bottom, side_by_side), right);
    const __m256i even = _mm256_madd_epi16(_mm256_unpacklo_epi16(top, bottom), even_down);
    const __m256i odd = _mm256_madd_epi16(_mm256_unpackhi_epi16(top, bottom), odd_down);
    return _mm256_packs_epi32(_mm256_srli_epi32(_mm256_add_epi32(even, half), 10),
                              _mm256_srli_epi32(_mm256_add_epi32(odd, half), 10));
}

// A row of blend_words over affine_taps. Where both taps are one pixel at the edge, the word to the
// right of it is read with weight 0: one word behind the picture must be readable.
static inline int blend_row(const uint32_t *picture, Steps row, const int *columns_x,
                            const int *columns_y, int size, uint32_t *out) {
    const __m256i last = _mm256_set1_epi32(size - 1), ones = _mm256_set1_epi32(31);
    const __m256i row_x = _mm256_set1_epi32(row.x), row_y = _mm256_set1_epi32(row.y);
    int x = 0;
    for (; x + 8 <= size; x += 8) {
        const auto *at_x = reinterpret_cast<const __m256i *>(columns_x + x);
        const auto *at_y = reinterpret_cast<const __m256i *>(columns_y + x);
        const __m256i fine_x =
            _mm256_srai_epi32(_mm256_add_epi32(row_x, _mm256_loadu_si256(at_x)), 5);
        const __m256i fine_y =
            _mm256_srai_epi32(_mm256_add_epi32(row_y, _mm256_loadu_si256(at_y)), 5);
        const __m256i left = _mm256_srai_epi32(fine_x, 5), upper = _mm256_srai_epi32(fine_y, 5);
        const __m256i left_inside = clamped(left, size - 1),
                      upper_inside = clamped(upper, size - 1);
        // Whether the second tap is another pixel than the first.
        const __m256i steps_right =
            _mm256_and_si256(_mm256_cmpeq_epi32(left, left_inside), _mm256_cmpgt_epi32(last, left));
        const __m256i steps_down = _mm256_and_si256(_mm256_cmpeq_epi32(upper, upper_inside),
                                                    _mm256_cmpgt_epi32(last, upper));
        const __m256i top = _mm256_add_epi32(
            _mm256_mullo_epi32(upper_inside, _mm256_set1_epi32(size)), left_inside);
        const __m256i bottom =
            _mm256_add_epi32(top, _mm256_and_si256(steps_down, _mm256_set1_epi32(size)));

        const __m256i part_x = _mm256_and_si256(_mm256_and_si256(fine_x, ones), steps_right);
        const __m256i part_y = _mm256_and_si256(fine_y, ones);
        const __m256i whole = _mm256_set1_epi32(32);
        __m256i right =
            _mm256_or_si256(_mm256_sub_epi32(whole, part_x), _mm256_slli_epi32(part_x, 8));
        right = _mm256_or_si256(right, _mm256_slli_epi32(right, 16));
        const __m256i down =
            _mm256_or_si256(_mm256_sub_epi32(whole, part_y), _mm256_slli_epi32(part_y, 16));

        const PixelPairs tops = gather_pairs(picture, top), bottoms = gather_pairs(picture, bottom);
        const __m256i first =
            blend_four(tops.first, bottoms.first, _mm256_unpacklo_epi32(right, right),
                       _mm256_shuffle_epi32(down, 0x00), _mm256_shuffle_epi32(down, 0x55));
        const __m256i second =
            blend_four(tops.second, bottoms.second, _mm256_unpackhi_epi32(right, right),
                       _mm256_shuffle_epi32(down, 0xAA), _mm256_shuffle_epi32(down, 0xFF));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + x),
                            _mm256_packus_epi16(first, second));
    }
    return x;
}

// ---- random warp ------------------------------------------------------------------------------

static inline __m256 mixed(__m256 first, __m256 second, __m256 part) {
    return _mm256_fmadd_ps(_mm256_sub_ps(second, first), part, first);
}

// One level of each word as a number.
static inline __m256 numbers_of(__m256i words, __m256i channel) {
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(words, channel));
}

// Byte 0 of each word, zero-extended; `channel` more for the others.
static inline __m256i channel_bytes(int channel) {
    const __m256i zeros = _mm256_set1_epi32(static_cast<int>(0x80808000u));
    const __m256i first = _mm256_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12);
    return _mm256_add_epi32(_mm256_or_si256(zeros, first), _mm256_set1_epi32(channel));
}

static inline __m256i word_of(const PixelPairs &pairs, bool is_right) {
    const __m256 first = _mm256_castsi256_ps(pairs.first),
                 second = _mm256_castsi256_ps(pairs.second);
    return _mm256_castps_si256(is_right ? _mm256_shuffle_ps(first, second, 0xDD)
                                        : _mm256_shuffle_ps(first, second, 0x88));
}

// A row of mix_words over place_of: out of a picture that has a border of zeros.
static inline int sample_row(const uint32_t *picture, int stride, const float *place_x,
                             const float *place_y, int size, uint32_t *out) {
    const __m256 low = _mm256_set1_ps(-2.0f), high = _mm256_set1_ps(static_cast<float>(size));
    int x = 0;
    for (; x + 8 <= size; x += 8) {
        // As clamp_number has it, NaN becomes the lower end.
        const __m256 at_x = _mm256_min_ps(_mm256_max_ps(_mm256_loadu_ps(place_x + x), low), high);
        const __m256 at_y = _mm256_min_ps(_mm256_max_ps(_mm256_loadu_ps(place_y + x), low), high);
        const __m256 column = _mm256_floor_ps(at_x), row = _mm256_floor_ps(at_y);
        const __m256 right = _mm256_sub_ps(at_x, column), down = _mm256_sub_ps(at_y, row);
        const __m256i top = _mm256_add_epi32(
            _mm256_mullo_epi32(_mm256_cvttps_epi32(row), _mm256_set1_epi32(stride)),
            _mm256_cvttps_epi32(column));
        const PixelPairs tops = gather_pairs(picture, top);
        const PixelPairs bottoms = gather_pairs(picture + stride, top);
        __m256i mixed_words = _mm256_setzero_si256();
        for (int c = 0; c < 3; ++c) {
            const __m256i channel = channel_bytes(c);
            const __m256 upper = mixed(numbers_of(word_of(tops, false), channel),
                                       numbers_of(word_of(tops, true), channel), right);
            const __m256 lower = mixed(numbers_of(word_of(bottoms, false), channel),
                                       numbers_of(word_of(bottoms, true), channel), right);
            const __m256i level = _mm256_cvtps_epi32(mixed(upper, lower, down));
            mixed_words = _mm256_or_si256(mixed_words, _mm256_slli_epi32(level, 8 * c));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + x), mixed_words);
    }
    return x;
}

// ---- what is stored ---------------------------------------------------------------------------

// 1 / 255 as the sum of two floats: of all 256 levels, their product is the quotient, rounded once.
constexpr float kLevel = 1.0f / 255, kLevelRest = 1.0 / 255 - 1.0f / 255;

// A row of unit_level: B G R, or R G B. `streams`: past the cache, `out` at a whole 32 bytes.
static inline int store_units(const uint32_t *row, int count, int rgb, bool streams, float *out) {
    const __m128i bgr = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m128i swapped = _mm_setr_epi8(2, 1, 0, 6, 5, 4, 10, 9, 8, 14, 13, 12, -1, -1, -1, -1);
    const __m256i order = _mm256_broadcastsi128_si256(rgb ? swapped : bgr);
    int x = 0;
    for (; x + 8 <= count; x += 8) {
        const auto *at = reinterpret_cast<const __m256i *>(row + x);
        const __m256i levels = _mm256_shuffle_epi8(_mm256_loadu_si256(at), order);
        const __m128i low = _mm256_castsi256_si128(levels),
                      high = _mm256_extracti128_si256(levels, 1);  // twelve levels in each
        const __m128i thirds[3] = {low, _mm_unpacklo_epi32(_mm_srli_si128(low, 8), high),
                                   _mm_srli_si128(high, 4)};
        for (int i = 0; i < 3; ++i) {
            const __m256 numbers = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(thirds[i]));
            const __m256 rest = _mm256_mul_ps(numbers, _mm256_set1_ps(kLevelRest));
            const __m256 units = _mm256_fmadd_ps(numbers, _mm256_set1_ps(kLevel), rest);
            if (streams)
                _mm256_stream_ps(out + 3 * x + 8 * i, units);
            else
                _mm256_storeu_ps(out + 3 * x + 8 * i, units);
        }
    }
    return x;
}

// A row of a multiple of eight numbers, past the cache to a whole 32 bytes.
static inline void stream_row(const float *row, int count, float *out) {
    for (int x = 0; x < count; x += 8) _mm256_stream_ps(out + x, _mm256_loadu_ps(row + x));
}

}  // namespace mien

#endif
