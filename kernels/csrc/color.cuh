// 8-bit BGR <-> LAB and contrast-limited adaptive histogram equalisation, as OpenCV 5 computes
// them: integers and tables, so that every level is the same on CPU and GPU.
//
// LAB: linear = gamma(byte) * 2040; X, Y, Z = M * linear / white point with 12 fractional bits;
// f = cube root with 15; L = 116 f(Y) - 16 on 0..255, a = 500 (f(X) - f(Y)) + 128,
// b = 200 (f(Y) - f(Z)) + 128. The way back has 14 fractional bits.
#pragma once

#include "host_device.cuh"

namespace mien {

// ---- tables, computed by the compiler --------------------------------------------------------

constexpr double root(double value, int degree) {  // Newton; value in 0..1
    if (value <= 0) return 0;
    double guess = 1;
    for (int step = 0; step < 200; ++step) {
        double power = 1;
        for (int i = 1; i < degree; ++i) power *= guess;
        const double next = guess - (guess * power - value) / (degree * power);
        if (next >= guess) break;
        guess = next;
    }
    return guess;
}

constexpr int rounded(double value) {  // half to even; value >= 0
    const int floor = static_cast<int>(value);
    const double rest = value - floor;
    return floor + (rest > 0.5 || (rest == 0.5 && floor % 2 == 1) ? 1 : 0);
}

struct ColorTables {
    // 32-bit entries, though fewer bits would do: that is what vector units gather.
    int32_t linear[256];         // byte -> linear light * 2040
    int32_t cube_root[2041];     // linear light * 2040 -> f * 2^15
    int32_t light[256];          // L -> Y * 2^14, and above its 16 bits f(Y) * 2^14
    int32_t gamma_encode[4096];  // linear light * 4096 -> byte
};

constexpr ColorTables make_color_tables() {
    ColorTables t{};
    for (int i = 0; i < 256; ++i) {
        const double x = i / 255.0, base = (x + 0.055) / 1.055;
        const double square = base * base;  // base^2.4 = base^2 * (base^2)^(1/5)
        t.linear[i] = rounded(2040 * (x <= 0.04045 ? x / 12.92 : square * root(square, 5)));
        const double light = i * 100 / 255.0, f = (light + 16) / 116;
        const double y = light <= 8 ? light / 903.3 : f * f * f;
        t.light[i] =
            rounded(16384 * y) | (rounded(16384 * (light <= 8 ? 7.787 * y + 16.0 / 116 : f)) << 16);
    }
    for (int i = 0; i <= 2040; ++i) {
        const double x = i / 2040.0;
        const double f = x < 0.008856 ? 7.787 * x + 16.0 / 116 : root(x, 3);
        // Through float: two entries lie so close to one half that OpenCV's float decides them.
        t.cube_root[i] = rounded(static_cast<float>(32768 * f));
    }
    for (int i = 0; i < 4096; ++i) {
        const double x = i / 4096.0, fourth = root(root(x, 2), 2), twelfth = root(fourth, 3);
        const double power = twelfth * twelfth * fourth;  // x^(5/12)
        t.gamma_encode[i] = rounded(255 * (x <= 0.0031308 ? 12.92 * x : 1.055 * power - 0.055));
    }
    return t;
}

// ---- LAB -------------------------------------------------------------------------------------

struct Lab {
    int l, a, b;
};

MIEN_HD int cube_root_of(const ColorTables &t, int from_red, int from_green, int from_blue, int red,
                         int green, int blue) {
    return t.cube_root[(from_red * red + from_green * green + from_blue * blue + 2048) >> 12];
}

constexpr int kLightScale = (116 * 255 + 50) / 100;
constexpr int kLightShift = -((16 * 255 * 32768 + 50) / 100);
constexpr int kHalf = 16384;                  // of what the 15 fractional bits are rounded off by
constexpr int kMiddle = 128 * 32768 + kHalf;  // a and b of a grey

MIEN_HD int lightness(int f_y) { return (kLightScale * f_y + kLightShift + kHalf) >> 15; }

// L alone, of a store pixel (B in the lowest byte).
MIEN_HD int lightness_of(const ColorTables &t, uint32_t bgr) {
    const int blue = t.linear[bgr & 255], green = t.linear[(bgr >> 8) & 255];
    const int red = t.linear[(bgr >> 16) & 255];
    return lightness(cube_root_of(t, 871, 2929, 296, red, green, blue));
}

MIEN_HD Lab lab_of(const ColorTables &t, uint32_t bgr) {
    const int blue = t.linear[bgr & 255], green = t.linear[(bgr >> 8) & 255];
    const int red = t.linear[(bgr >> 16) & 255];
    const int x = cube_root_of(t, 1777, 1541, 778, red, green, blue);
    const int y = cube_root_of(t, 871, 2929, 296, red, green, blue);
    const int z = cube_root_of(t, 73, 448, 3575, red, green, blue);
    // No colour leaves 0..255: L 0..255, a 42..226, b 20..223.
    return {lightness(y), (500 * (x - y) + kMiddle) >> 15, (200 * (y - z) + kMiddle) >> 15};
}

// f * 108 / 841, rounded towards 0, by a product: of the f that lie on the straight piece.
MIEN_HD constexpr int straight_part(int f) {
    return static_cast<int>(static_cast<float>(f) * 0.12841856f);  // 2^-24 above 108 / 841
}

constexpr int kLowest = -8145;       // f of Z where L is 0 and b is 255
constexpr int kStraightUpTo = 3390;  // f where the cube begins

constexpr bool divides_exactly() {
    for (int f = kLowest; f <= kStraightUpTo; ++f)
        if (straight_part(f) != f * 108 / 841) return false;
    return true;
}
static_assert(divides_exactly(), "straight_part must be f * 108 / 841");

// f -> X or Z, both with 14 fractional bits: the cube, or the straight piece near black.
MIEN_HD int cube_of(int f) {
    const int straight = straight_part(f) - 290;
    const int cube = (((f * f) >> 14) * f) >> 14;
    return f <= kStraightUpTo ? straight : cube;
}

MIEN_HD uint32_t bgr_of(const ColorTables &t, Lab lab) {
    const int light = t.light[lab.l], y = light & 0xFFFF, f = light >> 16;
    const int x = cube_of(f + ((5 * lab.a * 53687 + 128) >> 13) - 4194);
    const int z = cube_of(f - (((lab.b * 41943 + 16) >> 9) - 10484));
    const int blue = (217 * x + -836 * y + 4715 * z + 8192) >> 14;
    const int green = (-3773 * x + 7684 * y + 185 * z + 8192) >> 14;
    const int red = (12615 * x + -6296 * y + -2223 * z + 8192) >> 14;
    return static_cast<uint32_t>(t.gamma_encode[clamp_int(blue, 0, 4095)] |
                                 (t.gamma_encode[clamp_int(green, 0, 4095)] << 8) |
                                 (t.gamma_encode[clamp_int(red, 0, 4095)] << 16));
}

// Move a level towards 255 or 0 by a part of the distance, at most all of it; truncated.
MIEN_HD int shifted(int level, float change) {
    const float value = static_cast<float>(level), part = clamp_number(change, -1.0f, 1.0f);
    return static_cast<int>(part >= 0 ? value + (255.0f - value) * part : value * (1.0f + part));
}

// ---- CLAHE -----------------------------------------------------------------------------------

// Where a tile that reaches over the edge reads: 0 1 2 | 1 0.
MIEN_HD int reflected(int at, int size) {
    const int period = size > 1 ? 2 * (size - 1) : 1;
    at %= period;
    return at < size ? at : period - at;
}

struct ClaheTiles {
    int count, edge_px, clip, area;
    float scale, per_px;
};

MIEN_HD ClaheTiles clahe_of(int tiles, int size_px) {
    const int edge = (size_px + tiles - 1) / tiles, area = edge * edge;
    const int clip = static_cast<int>(2.0 * area / 256);
    return {tiles,
            edge,
            clip > 1 ? clip : 1,
            area,
            255.0f / static_cast<float>(area),
            1.0f / static_cast<float>(edge)};
}

// What one bin gets of the pixels cut off by the clip limit.
MIEN_HD int clahe_share(int bin, int excess) {
    const int rest = excess % 256;
    if (rest == 0) return excess / 256;
    const int step = 256 / rest > 1 ? 256 / rest : 1;
    return excess / 256 + (bin % step == 0 && bin / step < rest ? 1 : 0);
}

MIEN_HD int clahe_level(const ClaheTiles &tiles, int pixels_up_to) {
    return clamp_int(round_int(static_cast<float>(pixels_up_to) * tiles.scale), 0, 255);
}

// Which two tiles a row or column lies between, and how near it is to the second.
struct ClaheSpan {
    int first, second;
    float part;
};

MIEN_HD ClaheSpan clahe_span(const ClaheTiles &tiles, int at) {
    const float position = static_cast<float>(at) * tiles.per_px - 0.5f;
    const int first = position < 0 ? -1 : static_cast<int>(position);
    return {first < 0 ? 0 : first, first + 1 < tiles.count ? first + 1 : tiles.count - 1,
            position - static_cast<float>(first)};
}

MIEN_HD int clahe_blend(const ClaheSpan &x, const ClaheSpan &y, int near_near, int near_far,
                        int far_near, int far_far) {
    const float x_rest = 1.0f - x.part, y_rest = 1.0f - y.part;
    const float upper =
        static_cast<float>(near_near) * x_rest + static_cast<float>(near_far) * x.part;
    const float lower =
        static_cast<float>(far_near) * x_rest + static_cast<float>(far_far) * x.part;
    return round_int(upper * y_rest + lower * y.part);
}

}  // namespace mien
