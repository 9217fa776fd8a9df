// Per-pixel maths of the augmentation: affine, random warp, area resize, weights, store formats.
// A picture pixel is 8 bytes in one uint64_t: B G R face eye mouth 0 0, B in the lowest byte.
#pragma once

#include "color.cuh"
#include "mien.h"

namespace mien {

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

MIEN_HD Steps column_steps(const Inverse &inverse, int column) {
    return {round_int(inverse.x_by_x * column * 1024), round_int(inverse.y_by_x * column * 1024)};
}

MIEN_HD Steps row_steps(const Inverse &inverse, int row) {
    return {round_int((inverse.x_by_y * row + inverse.x_add) * 1024) + 16,
            round_int((inverse.y_by_y * row + inverse.y_add) * 1024) + 16};
}

MIEN_HD uint64_t load_pixel(const uint64_t *pixel) {
#if defined(__CUDA_ARCH__)
    return __ldg(reinterpret_cast<const unsigned long long *>(pixel));
#else
    return *pixel;
#endif
}

// Bilinear mix of four pixels, all channels; right and down are the weights of the second, in
// 32nds.
MIEN_HD uint64_t blend_pixels(uint64_t top_left, uint64_t top_right, uint64_t bottom_left,
                              uint64_t bottom_right, int right, int down) {
#if defined(__CUDACC__)
    uint64_t out = 0;
#pragma unroll
    for (int shift = 0; shift < 48; shift += 8) {
        const int tl = static_cast<int>(top_left >> shift) & 255;
        const int tr = static_cast<int>(top_right >> shift) & 255;
        const int bl = static_cast<int>(bottom_left >> shift) & 255;
        const int br = static_cast<int>(bottom_right >> shift) & 255;
        const int top = 32 * tl + (tr - tl) * right, bottom = 32 * bl + (br - bl) * right;
        const int level = (32 * top + (bottom - top) * down + 512) >> 10;
        out |= static_cast<uint64_t>(static_cast<uint32_t>(level)) << shift;
    }
    return out;
#else
    typedef uint8_t Bytes __attribute__((vector_size(8)));
    typedef uint16_t Halves __attribute__((vector_size(16)));
    typedef uint32_t Wholes __attribute__((vector_size(32)));
    const auto wide = [](uint64_t pixel) __attribute__((always_inline)) {
        return __builtin_convertvector(reinterpret_cast<Bytes>(pixel), Halves);
    };
    const uint16_t r = static_cast<uint16_t>(right), l = static_cast<uint16_t>(32 - right);
    const uint32_t d = static_cast<uint32_t>(down), u = 32 - d;
    const Halves top = wide(top_left) * l + wide(top_right) * r;
    const Halves bottom = wide(bottom_left) * l + wide(bottom_right) * r;
    const Wholes sum =
        __builtin_convertvector(top, Wholes) * u + __builtin_convertvector(bottom, Wholes) * d;
    return reinterpret_cast<uint64_t>(__builtin_convertvector((sum + 512) >> 10, Bytes));
#endif
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
    const float last = static_cast<float>(size_px);
    float inside = position < -2.0f ? -2.0f : position;
    inside = inside > last ? last : inside;
    const float floor = floor_of(inside);
    return {static_cast<int>(floor), inside - floor};
}

MIEN_HD int mix_level(int top_left, int top_right, int bottom_left, int bottom_right, float right,
                      float down) {
    const float top = mix(static_cast<float>(top_left), static_cast<float>(top_right), right);
    const float bottom =
        mix(static_cast<float>(bottom_left), static_cast<float>(bottom_right), right);
    return round_int(mix(top, bottom, down));
}

// The same of whole pixels, B G R only.
MIEN_HD uint64_t mix_pixels(uint64_t top_left, uint64_t top_right, uint64_t bottom_left,
                            uint64_t bottom_right, float right, float down) {
    uint64_t out = 0;
    for (int shift = 0; shift < 24; shift += 8) {
        const int level = mix_level(static_cast<int>(top_left >> shift) & 255,
                                    static_cast<int>(top_right >> shift) & 255,
                                    static_cast<int>(bottom_left >> shift) & 255,
                                    static_cast<int>(bottom_right >> shift) & 255, right, down);
        out |= static_cast<uint64_t>(static_cast<uint32_t>(level)) << shift;
    }
    return out;
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

// Mean of a box of `ratio` x `ratio` levels.
MIEN_HD int box_mean(int sum, int ratio, float per_pixel) {
    return ratio == 2 ? (sum + 2) >> 2 : round_int(static_cast<float>(sum) * per_pixel);
}

// ---- what is stored ---------------------------------------------------------------------------

MIEN_HD float unit_level(int level) { return static_cast<float>(level) / 255.0f; }

MIEN_HD float pixel_weight(const mien_augment_job &job, int face, int eye, int mouth) {
    const float weight = unit_level(face) * (1.0f + job.eye_extra * unit_level(eye));
    return weight * (1.0f + job.mouth_extra * unit_level(mouth));
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
