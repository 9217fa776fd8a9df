// Per-pixel maths of the augmentation: affine, random warp, area resize, weights, store formats.
// A store pixel is two words of four levels: B G R face, B in the lowest byte, and eye mouth 0 0.
// Levels are handled a word at a time, two of them in one multiplication.
#pragma once

#include "color.cuh"
#include "mien.h"

namespace mien {

// Which side row `row` of a job belongs to.
MIEN_HD int side_of(const mien_augment_job &job, int64_t row) {
    return row * job.num_sides < job.count ? 0 : 1;
}

// ---- affine: fixed point, 5 fractional bits of position, 10 of weight -------------------------

// Output position -> source position, scaled by 1024.
struct Inverse {
    double x_by_x, x_by_y, x_add, y_by_x, y_by_y, y_add;
};

MIEN_HD Inverse inverse_of(const float matrix[6]) {
    const double a = matrix[0], b = matrix[1], c = matrix[2];
    const double d = matrix[3], e = matrix[4], f = matrix[5];
    double scale = a * e - b * d;
    scale = scale != 0 ? 1.0 / scale : 0.0;
    const double x_by_x = e * scale, x_by_y = b * -scale, y_by_x = d * -scale, y_by_y = a * scale;
    return {x_by_x, x_by_y, -x_by_x * c - x_by_y * f, y_by_x, y_by_y, -y_by_x * c - y_by_y * f};
}

struct Steps {
    int x, y;
};

// Of any affine, whatever its matrix holds: 2^20 px are far outside, and two of them have a sum.
MIEN_HD int step_of(double position) {
    constexpr double kFarthest = (1 << 30) - 32;
    return round_int(clamp_number(position * 1024, -kFarthest, kFarthest));
}

MIEN_HD Steps column_steps(const Inverse &inverse, int column) {
    return {step_of(inverse.x_by_x * column), step_of(inverse.y_by_x * column)};
}

MIEN_HD Steps row_steps(const Inverse &inverse, int row) {
    return {step_of(inverse.x_by_y * row + inverse.x_add) + 16,
            step_of(inverse.y_by_y * row + inverse.y_add) + 16};
}

MIEN_HD uint32_t even_levels(uint32_t word) { return word & 0x00FF00FFu; }
MIEN_HD uint32_t odd_levels(uint32_t word) { return (word >> 8) & 0x00FF00FFu; }

// Bilinear mix of four words; right and down are the weights of the second, in 32nds.
MIEN_HD uint32_t blend_words(uint32_t top_left, uint32_t top_right, uint32_t bottom_left,
                             uint32_t bottom_right, uint32_t right, uint32_t down) {
    const uint32_t left = 32 - right, up = 32 - down;
    const uint32_t top_even = even_levels(top_left) * left + even_levels(top_right) * right;
    const uint32_t top_odd = odd_levels(top_left) * left + odd_levels(top_right) * right;
    const uint32_t low_even = even_levels(bottom_left) * left + even_levels(bottom_right) * right;
    const uint32_t low_odd = odd_levels(bottom_left) * left + odd_levels(bottom_right) * right;
    const uint32_t first = ((top_even & 0xFFFF) * up + (low_even & 0xFFFF) * down + 512) >> 10;
    const uint32_t second = ((top_odd & 0xFFFF) * up + (low_odd & 0xFFFF) * down + 512) >> 10;
    const uint32_t third = ((top_even >> 16) * up + (low_even >> 16) * down + 512) >> 10;
    const uint32_t fourth = ((top_odd >> 16) * up + (low_odd >> 16) * down + 512) >> 10;
    return first | (second << 8) | (third << 16) | (fourth << 24);
}

// Where one output pixel of the affine comes from: four indices, the edge repeated, and two
// weights.
struct Taps {
    int top_left, top_right, bottom_left, bottom_right;
    uint32_t right, down;
};

MIEN_HD Taps affine_taps(Steps row, Steps column, int size_px) {
    const int x = (row.x + column.x) >> 5, y = (row.y + column.y) >> 5, last = size_px - 1;
    const int left = clamp_int(x >> 5, 0, last), right = clamp_int((x >> 5) + 1, 0, last);
    const int top = clamp_int(y >> 5, 0, last) * size_px;
    const int bottom = clamp_int((y >> 5) + 1, 0, last) * size_px;
    return {top + left,
            top + right,
            bottom + left,
            bottom + right,
            static_cast<uint32_t>(x & 31),
            static_cast<uint32_t>(y & 31)};
}

// ---- random warp ------------------------------------------------------------------------------

// Between which control points a row or column of the crop lies: the 5 x 5 grid is stretched over
// 1.25 S, from which S are cut a tenth in.
struct GridSpan {
    int first;   // 4: the next one is 4 as well
    float part;  // of the next one
};

MIEN_HD GridSpan grid_span(int at, int size_px) {
    const int stretched = size_px * 5 / 4;
    const double position = (at + stretched / 10 + 0.5) * (5.0 / stretched) - 0.5;
    if (position < 0) return {0, 0.0f};
    const int first = static_cast<int>(position);
    return first < 4 ? GridSpan{first, static_cast<float>(position - first)} : GridSpan{4, 0.0f};
}

// Control point `at` of an axis: 0, S/4, S/2, 3S/4, S and the noise.
MIEN_HD float grid_point(int at, int size_px, float noise) {
    return static_cast<float>(at * (size_px * 0.25)) + noise;
}

MIEN_HD float mix(float first, float second, float part) {
    return fused(second - first, part, first);
}

// Where a position falls in a picture that has a border of zeros: the pixel and the part of the
// next.
struct Place {
    int first;
    float part;
};

MIEN_HD Place place_of(float position, int size_px) {
    const float inside = clamp_number(position, -2.0f, static_cast<float>(size_px));
    const float floor = floor_of(inside);
    return {static_cast<int>(floor), inside - floor};
}

// The same in a picture whose edge is repeated.
struct EdgePlace {
    int first, second;
    float part;
};

MIEN_HD EdgePlace edge_place_of(float position, int size_px) {
    const float inside = clamp_number(position, 0.0f, static_cast<float>(size_px - 1));
    const int first = static_cast<int>(inside);
    return {first, first < size_px - 1 ? first + 1 : first, inside - static_cast<float>(first)};
}

// A position in the turned and mirrored picture -> where it comes from in the picture before.
struct Back {
    float x_by_x, x_by_y, x_add, y_by_x, y_by_y, y_add;
};

MIEN_HD Back back_of(const mien_face &face, int size_px) {
    const Inverse inverse = inverse_of(face.matrix);
    const double mirror = face.flip ? -1 : 1, start = face.flip ? size_px - 1 : 0;
    return {static_cast<float>(inverse.x_by_x * mirror),
            static_cast<float>(inverse.x_by_y),
            static_cast<float>(inverse.x_by_x * start + inverse.x_add),
            static_cast<float>(inverse.y_by_x * mirror),
            static_cast<float>(inverse.y_by_y),
            static_cast<float>(inverse.y_by_x * start + inverse.y_add)};
}

MIEN_HD float back_x(const Back &back, float x, float y) {
    return fused(back.x_by_x, x, fused(back.x_by_y, y, back.x_add));
}

MIEN_HD float back_y(const Back &back, float x, float y) {
    return fused(back.y_by_x, x, fused(back.y_by_y, y, back.y_add));
}

MIEN_HD int mix_level(int top_left, int top_right, int bottom_left, int bottom_right, float right,
                      float down) {
    const float top = mix(static_cast<float>(top_left), static_cast<float>(top_right), right);
    const float bottom =
        mix(static_cast<float>(bottom_left), static_cast<float>(bottom_right), right);
    return round_int(mix(top, bottom, down));
}

MIEN_HD int level_of(uint32_t word, int channel) {
    return static_cast<int>(word >> 8 * channel) & 255;
}

// The same of the first three levels of a word.
MIEN_HD uint32_t mix_words(uint32_t top_left, uint32_t top_right, uint32_t bottom_left,
                           uint32_t bottom_right, float right, float down) {
    int mixed[3] = {};
    for (int c = 0; c < 3; ++c)
        mixed[c] = mix_level(level_of(top_left, c), level_of(top_right, c),
                             level_of(bottom_left, c), level_of(bottom_right, c), right, down);
    return static_cast<uint32_t>(mixed[0] | (mixed[1] << 8) | (mixed[2] << 16));
}

// ---- area resize ------------------------------------------------------------------------------

// Which source pixels an output pixel covers, and the weight of the first, the inner and the last.
struct AreaSpan {
    int begin, count;
    float first, inner, last;
};

MIEN_HD float area_weight(const AreaSpan &span, int at) {
    return at == 0 ? span.first : at == span.count - 1 ? span.last : span.inner;
}

MIEN_HD AreaSpan area_span(int at, int from_px, int to_px) {
    const double scale = static_cast<double>(from_px) / to_px;
    const double low = at * scale, high = low + scale;
    const double covered = scale < from_px - low ? scale : from_px - low;
    int inner_begin = static_cast<int>(low) + (low > static_cast<int>(low) ? 1 : 0);
    int inner_end = static_cast<int>(high) < from_px - 1 ? static_cast<int>(high) : from_px - 1;
    if (inner_begin > inner_end) inner_begin = inner_end;
    AreaSpan span{inner_begin, inner_end - inner_begin, 0, static_cast<float>(1.0 / covered), 0};
    span.first = span.last = span.inner;
    if (inner_begin - low > 1e-3) {
        span.first = static_cast<float>((inner_begin - low) / covered);
        --span.begin;
        ++span.count;
    }
    if (high - inner_end > 1e-3) {
        double part = high - inner_end < 1 ? high - inner_end : 1.0;
        part = part < covered ? part : covered;
        span.last = static_cast<float>(part / covered);
        ++span.count;
    }
    return span;
}

// Mean of `ratio` x `ratio` levels, from their sum; 4096^2 of them have one below 2^32.
MIEN_HD int level_mean(uint32_t sum, int ratio) {
    return round_int(static_cast<float>(sum) * (1.0f / static_cast<float>(ratio * ratio)));
}

// How the mean of a 2 x 2 box is rounded where it lies midway. OpenCV rounds it up in pictures of
// up to four channels and to even in pictures of more, as the targets are where eye or mouth masks
// come with them.
enum Midway { kUp, kToEven };

// Mean of a box of `ratio` x `ratio` words; `stride` words a row.
MIEN_HD uint32_t box_mean(const uint32_t *box, int stride, int ratio, Midway midway) {
    if (ratio == 2) {
        uint32_t even = 0, odd = 0;
        for (int y = 0; y < 2; ++y) {
            for (int x = 0; x < 2; ++x) {
                even += even_levels(box[y * stride + x]);
                odd += odd_levels(box[y * stride + x]);
            }
        }
        // Half of the divisor; to round to even, one less where the quotient is even.
        even += midway == kUp ? 0x00020002u : 0x00010001u + ((even >> 2) & 0x00010001u);
        odd += midway == kUp ? 0x00020002u : 0x00010001u + ((odd >> 2) & 0x00010001u);
        return even_levels(even >> 2) | (even_levels(odd >> 2) << 8);
    }
    uint32_t sums[4] = {};
    for (int y = 0; y < ratio; ++y)
        for (int x = 0; x < ratio; ++x)
            for (int c = 0; c < 4; ++c)
                sums[c] += static_cast<uint32_t>(level_of(box[y * stride + x], c));
    uint32_t mean = 0;
    for (int c = 0; c < 4; ++c) mean |= static_cast<uint32_t>(level_mean(sums[c], ratio)) << 8 * c;
    return mean;
}

// One output word of the resize by a ratio that is no whole number.
MIEN_HD uint32_t area_mean(const uint32_t *picture, int stride, const AreaSpan &columns,
                           const AreaSpan &rows) {
    float sums[4] = {};
    for (int y = 0; y < rows.count; ++y) {
        const uint32_t *row = picture + (rows.begin + y) * stride + columns.begin;
        float line[4] = {};
        for (int x = 0; x < columns.count; ++x) {
            const float weight = area_weight(columns, x);
            for (int c = 0; c < 4; ++c) line[c] += static_cast<float>(level_of(row[x], c)) * weight;
        }
        const float weight = area_weight(rows, y);
        for (int c = 0; c < 4; ++c) sums[c] += line[c] * weight;
    }
    uint32_t mean = 0;
    for (int c = 0; c < 4; ++c)
        mean |= static_cast<uint32_t>(clamp_int(round_int(sums[c]), 0, 255)) << 8 * c;
    return mean;
}

// ---- what is stored ---------------------------------------------------------------------------

MIEN_HD float unit_level(int level) { return static_cast<float>(level) / 255.0f; }

MIEN_HD float pixel_weight(float eye_extra, float mouth_extra, uint32_t picture, uint32_t areas) {
    const float eye = unit_level(level_of(areas, 0)), mouth = unit_level(level_of(areas, 1));
    return unit_level(level_of(picture, 3)) * (1.0f + eye_extra * eye) *
           (1.0f + mouth_extra * mouth);
}

// Nearest bfloat16 of a number, ties to even.
MIEN_HD uint16_t bfloat16_bits(float value) {
    const uint32_t bits = float_bits(value);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

// Nearest float16 of 0 or of a number within 2^-14 ... 65504, ties to even.
MIEN_HD uint16_t float16_bits(float value) {
    if (value == 0.0f) return 0;
    const uint32_t bits = float_bits(value) - (112u << 23);
    return static_cast<uint16_t>((bits + 0x0FFFu + ((bits >> 13) & 1)) >> 13);
}

}  // namespace mien
